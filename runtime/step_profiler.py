"""Profiles step latency with synthetic requests at start, to calibrate dynamic trees and prompt chunks.

The profile is stored in the user's cache directory for the next start, under a hash of model, machine, group size and
settings.
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

_VERSION = 2  # of stored profiles; to be raised when the timed code becomes faster or slower
_REPEATS = 3  # timed calls of a step
_LONG = 0.2  # seconds after which a step is timed only once
_LONGEST = 20.0  # seconds after which the second round of measurements ends
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
    """Profile ``run``, which runs one step of such segments on all ranks, at all sizes within ``limits``.

    ``steps``: steps are padded to buckets. ``time_step`` runs its argument and returns the seconds it took.
    ``time_choice`` returns the seconds that the host takes to choose draft tokens for that many requests. Both default
    to wall-clock time.
    """
    time_step = time_step or _time

    def clock_choice(n: int) -> float:
        return _time(_choice(n, num_heads)) if num_heads else 0.0

    time_choice = time_choice or clock_choice
    requests = [n for n in _REQUESTS if n <= limits.max_num_seqs] or [1]
    most = limits.max_num_batched_tokens
    extra = [n for n in (_BUCKETS if steps else _EXTRA) if n + 1 <= most]
    # With buckets ``extra`` counts all rows of a step but one, so that each bucket is measured full.
    start = {n: n - 1 if steps else 0 for n in requests}
    sizes = [(n, e) for n in requests for e in extra if 0 <= e - start[n] <= min(most - n, n * (MAX_NODES - 1))]
    choosing, begun = [time_choice(n) for n in requests], time.perf_counter()
    times: dict[tuple[int, int | None], float] = {}
    wanted = [*[(n, None) for n in requests], *sizes]
    # Two rounds over all sizes: a slow moment of the machine must not distort the comparison of two sizes.
    for n, e in tqdm([*wanted, *wanted], desc="profiling", unit="size", disable=None, leave=False):
        if (n, e) in times and time.perf_counter() - begun > _LONGEST:
            break
        segments = _segments(limits, n, 0, False) if e is None else _segments(limits, n, e - start[n], num_heads > 0)
        times[n, e] = min(time_step(partial(run, segments)), times.get((n, e), math.inf))
    plain = {n: times[n, None] for n in requests}
    rows = [_filled([times.get((n, e)) for e in extra], extra) for n in requests]
    context = min(limits.max_model_len, limits.num_pages * limits.page_size) - 1
    # The contexts fill all pages, because that of one request would be lost in the noise of step times.
    held = {n: min(context, limits.num_pages // n * limits.page_size - 1) for n in requests}
    many = max(requests, key=lambda n: n * held[n])
    far = time_step(lambda: run(_segments(limits, many, 0, False, held[many])))
    per_token = max(0.0, (far - plain[many]) / max(many * held[many], 1))
    chunk = min(64, most, context // 2)
    near, behind = (time_step(partial(run, [_chunk(limits, chunk, at)])) for at in (0, context - chunk))
    per_pair = max(0.0, (behind - near) / max(chunk * (context - chunk), 1))
    return Profile(requests, [plain[n] for n in requests], extra, rows, per_token, per_pair, steps, choosing)


def cached(key: dict, measure: Callable[[], Profile]) -> Profile:
    """Return the stored profile for ``key``, or call ``measure`` and store its result."""
    name = hashlib.sha256(json.dumps(key | {"version": _VERSION}, sort_keys=True).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "euryale" / f"costs-{name}.json"
    try:
        return Profile.from_json(json_file.read(path))
    except ValueError:  # missing or damaged
        logger.info("profiling step times; the result is stored in %s", path)
        found = measure()
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(found.to_json()))
        draft.replace(path)  # atomic, because another server may write it too
    except OSError as error:
        logger.info("the profile of step times cannot be stored and is measured at each start: %s", error)
        with contextlib.suppress(OSError):
            draft.unlink()
    return found


def machine_key(device: torch.device) -> dict:
    """The properties of this machine that step times depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0))
    threads, version = torch.get_num_threads(), torch.__version__
    return {"host": platform.node(), "device": name, "cores": cores, "threads": threads, "torch": version}


def _time(step: Callable[[], object]) -> float:
    """Measure the seconds of a call: the minimum of several, since other processes can only prolong them.

    The first call may record a step and is not counted. Long calls are timed once.
    """
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
    """Return a function that chooses draft tokens for that many synthetic requests."""
    rng, shape = np.random.default_rng(0), (num_heads, DYNAMIC_CANDIDATES)
    made = []
    for key in range(requests):
        prompt, ids = rng.integers(0, 1000, ORDERS), rng.integers(0, 1000, shape)
        logits = -np.sort(rng.exponential(2.0, shape), axis=1)
        candidates = HeadCandidates(ids.astype(np.int32), logits.astype(np.float32))
        prompt = prompt.astype(np.int32)
        made.append(Request(key=key, prompt=prompt, params=SamplingParams(), head_candidates=candidates))
    drafter, room = DynamicDrafter(num_heads, MAX_NODES - 1), max(MIN_PROPOSED, 2 * requests)
    return lambda: drafter.draft(made, lambda: [DYNAMIC_DEPTH] * requests, room)


def _segments(limits: SchedulerLimits, requests: int, extra: int, heads: bool, context: int = 0) -> list[Segment]:
    """Segments of decoding ``requests`` with ``extra`` draft tokens in total, in binary trees."""
    each, more = divmod(extra, requests)
    nodes = [each + (i < more) for i in range(requests)]
    found, page = [], 0
    for n in nodes:
        found.append(_segment(limits, 1 + n, n, context, page, emits_tokens=True, heads=heads))
        page += len(found[-1].pages)  # pages of their own, since common ones would be read only once
    return found


def _chunk(limits: SchedulerLimits, rows: int, context: int) -> Segment:
    """A segment of ``rows`` prompt tokens after ``context`` tokens."""
    return _segment(limits, rows, 0, context, 0, emits_tokens=False, heads=False)


def _segment(
    limits: SchedulerLimits, rows: int, nodes: int, context: int, page: int, *, emits_tokens: bool, heads: bool
) -> Segment:
    """A segment of ``rows`` whose last ``nodes`` are draft tokens, on consecutive pages from ``page`` on."""
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
    """Fill in the sizes that were not measured.

    Sizes below the first measured one get its time. Those beyond the last one continue the mean slope.
    """
    known = [(i, t) for i, t in enumerate(times) if t is not None]
    (first, start), (last, end) = known[0], known[-1]
    slope = max(0.0, (end - start) / max(extra[last] - extra[first], 1))
    return [start] * first + [t for _, t in known] + [end + slope * (e - extra[last]) for e in extra[last + 1 :]]
