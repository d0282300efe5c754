"""What steps of this model cost on this machine, measured with made-up requests before the first real one comes.

The result is kept for the next start: in the user's cache directory, under a name that model, machine, group size and
settings make.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from euryale.runtime.step_graphs import ROWS
from euryale.scheduler import json_file
from euryale.scheduler.limits import SchedulerLimits
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.speculation.constants import MIN_PROPOSED, ORDERS
from euryale.scheduler.speculation.dynamic_drafter import DynamicDrafter
from euryale.scheduler.speculation.tree import DYNAMIC_CANDIDATES, DYNAMIC_DEPTH, MAX_NODES
from euryale.scheduler.step_cost import Profile
from euryale.scheduler.step_plan import Segment
from euryale.scheduler.step_result import HeadCandidates

logger = logging.getLogger("euryale.profile")

_VERSION = 2  # of what is kept; another one where the code that is timed became quicker or slower
_REPEATS, _LONG = 3, 0.2  # calls, and seconds of a call
_LONGEST = 20.0  # seconds after which nothing is measured twice
_REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_EXTRA = (0, 1, 3, 5, 7, 11, 15, 23, 31, 63, 127, 255, 511, 1023, 2047, 4095)
_BUCKETS = [rows - 1 for rows in ROWS]


def measure(
    run: Callable[[list[Segment]], object],
    limits: SchedulerLimits,
    num_heads: int,
    steps: bool,
    time_step: Callable[[Callable[[], object]], float] | None = None,
    time_choice: Callable[[int], float] | None = None,
) -> Profile:
    """Time ``run``, which runs one step of such segments on all ranks. ``limits`` say which sizes there are. ``steps``:
    steps are padded to buckets. ``time_step`` calls a step and says how long it took, ``time_choice`` how long the host
    takes to choose guesses for so many requests (default of both: as the clock says)."""
    time_step = time_step or _time
    time_choice = time_choice or (lambda n: _time(_choice(n, num_heads)) if num_heads else 0.0)
    requests = [n for n in _REQUESTS if n <= limits.max_num_seqs] or [1]
    most = limits.max_num_batched_tokens
    extra = [n for n in (_BUCKETS if steps else _EXTRA) if n + 1 <= most]
    # With buckets ``extra`` says how many rows there are in all, and full ones are not padded any further.
    start = {n: n - 1 if steps else 0 for n in requests}
    sizes = [(n, e) for n in requests for e in extra if 0 <= e - start[n] <= min(most - n, n * (MAX_NODES - 1))]
    choosing, begun = [time_choice(n) for n in requests], time.perf_counter()
    times: dict[tuple[int, int | None], float] = {}
    wanted = [*[(n, None) for n in requests], *sizes]
    # Twice, one round after the other: what is compared must not be from two times of which one was slow.
    for n, e in tqdm([*wanted, *wanted], desc="profiling", unit="size", disable=None, leave=False):
        if (n, e) in times and time.perf_counter() - begun > _LONGEST:
            break
        segments = _segments(limits, n, 0, False) if e is None else _segments(limits, n, e - start[n], num_heads > 0)
        times[n, e] = min(time_step(partial(run, segments)), times.get((n, e), math.inf))
    plain = {n: times[n, None] for n in requests}
    rows = [_filled([times.get((n, e)) for e in extra], extra) for n in requests]
    context = min(limits.max_model_len, limits.num_pages * limits.page_size) - 1
    # With as many tokens of context as there are pages: one request's would drown in the step's own noise.
    held = {n: min(context, limits.num_pages // n * limits.page_size - 1) for n in requests}
    many = max(requests, key=lambda n: n * held[n])
    far = time_step(lambda: run(_segments(limits, many, 0, False, held[many])))
    per_token = max(0.0, (far - plain[many]) / max(many * held[many], 1))
    chunk = min(64, most, context // 2)
    near, behind = (time_step(lambda at=at: run([_chunk(limits, chunk, at)])) for at in (0, context - chunk))
    per_pair = max(0.0, (behind - near) / max(chunk * (context - chunk), 1))
    return Profile(requests, [plain[n] for n in requests], extra, rows, per_token, per_pair, steps, choosing)


def cached(key: dict, measure: Callable[[], Profile]) -> Profile:
    """The profile of an earlier run with the same ``key``, or what ``measure`` says, which is then kept."""
    name = hashlib.sha256(json.dumps(key | {"version": _VERSION}, sort_keys=True).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "euryale" / f"costs-{name}.json"
    try:
        return Profile.from_json(json_file.read(path))
    except ValueError:  # there is none, or it is damaged: it is measured again
        logger.info("measuring what steps cost; kept in %s", path)
        found = measure()
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(found.to_json()))
        draft.replace(path)  # another server may be writing it too
    except OSError as error:
        logger.info("step costs are measured anew at each start: %s", error)
        with contextlib.suppress(OSError):
            draft.unlink()
    return found


def machine_key(device: torch.device) -> dict:
    """What the speed of a step depends on here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0))
    threads, version = torch.get_num_threads(), torch.__version__
    return {"host": platform.node(), "device": name, "cores": cores, "threads": threads, "torch": version}


def _time(step: Callable[[], None]) -> float:
    """Seconds of a call: the least of a few after one that may record, as other work only makes it longer; of a single
    one where they take long."""
    started = time.perf_counter()
    step()
    repeats = _REPEATS if time.perf_counter() - started < _LONG else 1
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return min(times)


def _choice(requests: int, num_heads: int) -> Callable[[], object]:
    """What the host does for the guesses of so many requests."""
    rng, shape = np.random.default_rng(0), (num_heads, DYNAMIC_CANDIDATES)
    made = []
    for key in range(requests):
        prompt, ids = rng.integers(0, 1000, ORDERS), rng.integers(0, 1000, shape)
        logits = -np.sort(rng.exponential(2.0, shape), axis=1)
        guesses = HeadCandidates(ids.astype(np.int32), logits.astype(np.float32))
        made.append(Request(key=key, prompt=prompt.astype(np.int32), params=SamplingParams(), head_candidates=guesses))
    trees, room = DynamicDrafter(num_heads, MAX_NODES - 1), max(MIN_PROPOSED, 2 * requests)
    return lambda: trees.draft(made, [DYNAMIC_DEPTH] * requests, room, 0)


def _segments(limits: SchedulerLimits, requests: int, extra: int, heads: bool, context: int = 0) -> list[Segment]:
    """``requests`` that decode, with ``extra`` guesses among them, in trees where each node has two children."""
    share, more = divmod(extra, requests)
    nodes = [share + (i < more) for i in range(requests)]
    found, page = [], 0
    for n in nodes:
        found.append(_segment(limits, 1 + n, n, context, page, emits_tokens=True, heads=heads))
        page += len(found[-1].pages)  # what several read would be read once
    return found


def _chunk(limits: SchedulerLimits, rows: int, context: int) -> Segment:
    """Part of a prompt, with ``context`` tokens before it."""
    return _segment(limits, rows, 0, context, 0, emits_tokens=False, heads=False)


def _segment(
    limits: SchedulerLimits, rows: int, nodes: int, context: int, page: int, *, emits_tokens: bool, heads: bool
) -> Segment:
    """``rows`` of one request, of which the last ``nodes`` are guesses, on pages from number ``page`` on."""
    used = -(-(context + rows) // limits.page_size)
    return Segment(
        tokens=np.full(rows, 1, dtype=np.int32),
        parents=(np.arange(nodes, dtype=np.int32)) // 2,
        pages=(page + np.arange(used, dtype=np.int32)) % limits.num_pages,
        context=context,
        emits_tokens=emits_tokens,
        wants_head_candidates=heads,
        output_index=0,
        params=SamplingParams(),
    )


def _filled(times: list[float | None], extra: list[int]) -> list[float]:
    """A row with the sizes that a step cannot have: before the first known one as that, and beyond the last one as if
    costs went on as they rose before."""
    known = [i for i, t in enumerate(times) if t is not None]
    last = known[-1]
    slope = max(0.0, (times[last] - times[known[0]]) / max(extra[last] - extra[known[0]], 1))
    found = [times[known[0]]] * known[0] + times[known[0] : last + 1]
    return found + [times[last] + slope * (e - extra[last]) for e in extra[last + 1 :]]
