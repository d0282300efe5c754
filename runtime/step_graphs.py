"""Decides which steps are recorded and replayed instead of launching each kernel from Python.

On a CPU a recording serves steps of exactly its numbers of rows and requests, because padding would cost what it saves.
On a GPU decoding steps are padded to the next bucket. A whole one replays as one CUDA graph.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable

from euryale.kernels import graph
from euryale.kernels.threads import num_threads
from euryale.kernels.tree_attention.work_list import kinds
from euryale.parallel.group import Group
from euryale.runtime.kv_cache import KVCache
from euryale.runtime.step_batch import StepArrays, StepBatch, StepKind, StepMemory, padding
from euryale.scheduler.step_plan import StepPlan

_REQUESTS = [2**n for n in range(13)]
ROWS = sorted({2**n for n in range(14)} | {3 * 2**n for n in range(2, 13)})


def bucket(rows: int, requests: int, most: int) -> tuple[int, int]:
    """Return rows and requests after padding to the next bucket; unchanged if that exceeds ``most`` rows.

    Each padding request has at least one row, so padding requests also adds rows.
    """
    if rows in ROWS and requests in _REQUESTS:
        return rows, requests
    padded = _REQUESTS[bisect_left(_REQUESTS, requests + 1)]
    place = bisect_left(ROWS, rows + padded - requests)
    if place == len(ROWS) or ROWS[place] > most:
        return rows, requests
    return ROWS[place], padded


class RecordedStep:
    """Memory and recording of all steps of one shape."""

    def __init__(self, memory: StepMemory, group: Group) -> None:
        self.memory, self._group = memory, group
        self.recording: graph.Recording | graph.CudaGraph | None = None

    @property
    def batch(self) -> StepBatch:
        """The batch that was filled in last."""
        return self.memory.batch

    def run(self, function: Callable[[StepBatch], tuple]) -> tuple:
        """Return ``function(batch)``: the first call records it, later calls replay it. Valid until the next call."""
        if self.recording is None:
            batch = self.batch
            self.recording = graph.record(lambda: function(batch), self._group.device)
        else:
            self._group.check(self.recording.replay())
        return self.recording.out


class StepGraphs:
    """The recorded steps, by shape; the ``max_graphs`` most recently used ones are kept.

    Steps of more than ``max_rows`` rows are not recorded: there the kernels take longer than their launches. ``pads``:
    record only decoding steps, padded to buckets, as on a GPU.
    """

    def __init__(self, cache: KVCache, group: Group, max_rows: int, pads: bool, max_graphs: int = 32) -> None:
        self._cache, self._group, self._device = cache, group, group.device
        self._max_rows, self._max_graphs, self.pads = max_rows, max_graphs, pads
        self._steps: OrderedDict[Hashable, RecordedStep] = OrderedDict()

    def prepare(self, plan: StepPlan) -> RecordedStep | None:
        """Fill the plan into the recorded step of its shape and return that; None if such steps are not recorded."""
        room = self._cache.num_pages
        is_large = plan.num_rows > self._max_rows or sum(len(s.pages) for s in plan.segments) > room
        if is_large or not graph.can_record(self._device):
            return None
        kind = StepKind.of(plan)
        if self.pads and not kind.is_decode:
            return None
        key = self._key(plan, kind)
        host = StepArrays.of(plan, self._cache.page_size, padded=key[0])
        step = self._steps.get(key)
        if step is not None and step.memory.fill(host) is not None:
            self._steps.move_to_end(key)
            return step
        if step is None and len(self._steps) >= self._max_graphs:
            self._steps.popitem(last=False)
        memory = StepMemory(host, self._cache.page_size, self._device, num_pages=room)
        step = self._steps[key] = RecordedStep(memory, self._group)
        self._steps.move_to_end(key)
        return step

    def recording(self, plan: StepPlan) -> graph.Recording | graph.CudaGraph | None:
        """The recording that serves steps like this one; None if there is none."""
        step = self._steps.get(self._key(plan, StepKind.of(plan)))
        return step.recording if step else None

    def _key(self, plan: StepPlan, kind: StepKind) -> tuple:
        """Everything that a recording depends on, beginning with the padded sizes."""
        sizes = plan.num_rows, len(plan.segments)
        if not self.pads:
            counts = [(s.num_draft_tokens + 1, s.wants_head_candidates) for s in plan.segments if s.emits_tokens]
            decided = 0 if kind.is_decode else (sum(n for n, _ in counts), sum(wants for _, wants in counts))
            return sizes, kind, decided, num_threads()
        padded = bucket(*sizes, self._cache.num_rows)
        rows = [len(s.tokens) for s in plan.segments] + padding(sizes, padded)
        return padded, kind, kinds(rows, self._cache.group_size)
