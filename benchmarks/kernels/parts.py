"""Time of a recorded step by part: native calls on a CPU, kernels on a GPU."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from euryale.kernels import graph
from euryale.runtime.step import StepRunner
from euryale.scheduler.step_plan import StepPlan

STEP = "step"  # the whole step
# Part -> names of native calls on a CPU, and parts of kernel names on a GPU.
_PARTS = {
    "products": (("linear_run", "quantized_run"), ("gemm", "gemv", "cutlass", "nvjet", "splitK", "cublas")),
    "attention": (("tree_attention",), ("_attend", "_merge_splits")),
    "commit": (("commit",), ("_copy_rows",)),
    "collectives": (("shared_all_reduce_add_rms_norm", "shared_all_gather"), ("nccl",)),
}


def part_of(name: str, on_gpu: bool) -> str:
    """Return the part that a native call or a kernel belongs to; "small kernels" is the rest."""
    for part, names in _PARTS.items():
        if any(word in name for word in names[1]) if on_gpu else name in names[0]:
            return part
    return "small kernels"


def _of_recording(recording: graph.Recording, run: Callable[[], object], rounds: int) -> dict[str, float]:
    """Return median seconds by part and of the whole step ``run``, interleaved."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        seconds = defaultdict(float, {STEP: time.perf_counter() - started})
        for name, spent in recording.time().items():
            seconds[part_of(name, False)] += spent
        for part, spent in seconds.items():
            found.setdefault(part, []).append(spent)
    return {part: statistics.median(seconds) for part, seconds in found.items()}


def _of_kernels(run: Callable[[], object], rounds: int) -> dict[str, float]:
    """Return mean seconds by part of the kernels that ``run`` launches, and of the whole step without the profiler."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        run()
    torch.cuda.synchronize()
    found = defaultdict(float, {STEP: (time.perf_counter() - started) / rounds})
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            run()
        torch.cuda.synchronize()
    for event in profiler.key_averages():
        found[part_of(event.key, True)] += event.self_device_time_total * 1e-6 / rounds
    return dict(found)


def _measure(recording: graph.Recording | graph.CudaGraph, run: Callable[[], object], rounds: int) -> dict[str, float]:
    if isinstance(recording, graph.Recording):
        return _of_recording(recording, run, rounds)
    return _of_kernels(run, rounds)


def parts(runner: StepRunner, plan: StepPlan, rounds: int) -> dict[str, float]:
    """Return seconds by part of a decoding step that ``runner`` has run before, and of the whole step (STEP).

    The heads are a part of their own. Empty if the step is not recorded.
    """
    recording = runner.graphs.recording(plan) if runner.graphs else None
    if recording is None:
        return {}
    found = _measure(recording, lambda: runner.run(plan), rounds)
    if plan.segments[0].wants_head_candidates:
        medusa_heads, device = runner.heads, runner.decoder.shard.group.device
        assert medusa_heads is not None, "the plan asks for head candidates"
        hidden = torch.zeros(1, runner.decoder.lm_head.in_features, dtype=runner.cache.pages.dtype, device=device)
        rows = torch.zeros(1, dtype=torch.int32, device=device)
        heads = graph.record(lambda: (medusa_heads.candidates(hidden, rows, runner.num_candidates),), device)
        of_heads = _measure(heads, heads.replay, rounds)
        del of_heads[STEP]
        found = {part: seconds - of_heads.get(part, 0.0) for part, seconds in found.items()}
        found["heads"] = sum(of_heads.values())
    return found
