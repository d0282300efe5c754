"""What a recorded step is made of: seconds by part, native call by native call on a CPU, kernel by kernel on a GPU."""

import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from euryale.kernels import graph
from euryale.runtime.step import StepRunner
from euryale.scheduler.step_plan import StepPlan

STEP = "step"  # the whole
# Part -> native calls on a CPU, and words in the names of kernels on a GPU.
_PARTS = {
    "products": (("linear_run", "quantized_run"), ("gemm", "gemv", "cutlass", "nvjet", "splitK", "cublas")),
    "attention": (("tree_attention",), ("_attend", "_merge_splits")),
    "commit": (("commit",), ("_copy_rows",)),
    "collectives": (("shared_all_reduce_add_rms_norm", "shared_all_gather"), ("nccl",)),
}


def part_of(name: str, on_gpu: bool) -> str:
    """The part that a native call or a kernel belongs to; "small kernels" for those around the named ones."""
    for part, names in _PARTS.items():
        if any(word in name for word in names[1]) if on_gpu else name in names[0]:
            return part
    return "small kernels"


def _of_recording(recording: graph.Recording, run: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median seconds by part, and of the whole step, ``run``, in turn with them: the machine's mood meets both."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        seconds = Counter({STEP: time.perf_counter() - started})
        for name, spent in recording.time().items():
            seconds[part_of(name, False)] += spent
        for part, spent in seconds.items():
            found.setdefault(part, []).append(spent)
    return {part: statistics.median(seconds) for part, seconds in found.items()}


def _of_kernels(run: Callable[[], object], rounds: int) -> dict[str, float]:
    """Mean seconds by part of what ``run`` launches, and of the whole, without the profiler."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        run()
    torch.cuda.synchronize()
    found = Counter({STEP: (time.perf_counter() - started) / rounds})
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            run()
        torch.cuda.synchronize()
    for event in profiler.key_averages():
        found[part_of(event.key, True)] += event.self_device_time_total * 1e-6 / rounds
    return dict(found)


def parts(runner: StepRunner, plan: StepPlan, rounds: int) -> dict[str, float]:
    """Seconds by part of a decoding step that ``runner`` has run before, and of all of it (STEP); empty if it is not
    recorded. The heads are a part of their own, whatever they are made of."""
    recording = runner.graphs.recording(plan) if runner.graphs else None
    if recording is None:
        return {}
    device = runner.decoder.shard.group.device
    on_gpu = device.type == "cuda"
    run = lambda: runner.run(plan)  # noqa: E731
    found = _of_kernels(run, rounds) if on_gpu else _of_recording(recording, run, rounds)
    if plan.segments[0].wants_head_candidates:
        hidden = torch.zeros(1, runner.decoder.lm_head.in_features, dtype=runner.cache.pages.dtype, device=device)
        rows = torch.zeros(1, dtype=torch.int32, device=device)
        heads = graph.record(lambda: (runner.heads.candidates(hidden, rows, runner.num_candidates),), device)
        of_heads = _of_kernels(heads.replay, rounds) if on_gpu else _of_recording(heads, heads.replay, rounds)
        del of_heads[STEP]
        found = {part: seconds - of_heads.get(part, 0.0) for part, seconds in found.items()}
        found["heads"] = sum(of_heads.values())
    return found
