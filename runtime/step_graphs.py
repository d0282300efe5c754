"""Which steps are replayed instead of being called kernel by kernel, and the batches they read.

On a CPU a step is recorded for just its number of rows and requests: padding would cost what it saves. On a GPU
decoding steps are padded to the next bucket, and replay as one CUDA graph from the embedding to the candidates.
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
    """The next sizes that a step is padded to, as it is if these are more than ``most`` rows: padding requests have a
    row each, so that rows grow with them."""
    if rows in ROWS and requests in _REQUESTS:
        return rows, requests
    padded = _REQUESTS[bisect_left(_REQUESTS, requests + 1)]
    place = bisect_left(ROWS, rows + padded - requests)
    if place == len(ROWS) or ROWS[place] > most:
        return rows, requests
    return ROWS[place], padded


class RecordedStep:
    """Steps of one shape: the memory they are written to, and their recording, once there is one."""

    def __init__(self, memory: StepMemory, group: Group) -> None:
        self.memory, self._group = memory, group
        self.recording: graph.Recording | graph.CudaGraph | None = None

    @property
    def batch(self) -> StepBatch:
        """The step that was filled in last."""
        return self.memory.batch

    def run(self, function: Callable[[StepBatch], tuple]) -> tuple:
        """Return ``function`` of the batch, recorded or replayed; valid until the next call."""
        if self.recording is None:
            batch = self.batch
            self.recording = graph.record(lambda: function(batch), self._group.device)
        else:
            self._group.check(self.recording.replay())
        return self.recording.out


class StepGraphs:
    """Recordings by the shapes of their steps; the ``max_graphs`` used last are kept. Steps of more than ``max_rows``
    rows run eagerly: there the kernels' own work outweighs the calls. ``pads``: decoding steps only, padded to buckets,
    as on a GPU."""

    def __init__(self, cache: KVCache, group: Group, max_rows: int, pads: bool, max_graphs: int = 32) -> None:
        self._cache, self._group, self._device = cache, group, group.device
        self._max_rows, self._max_graphs, self.pads = max_rows, max_graphs, pads
        self._steps: OrderedDict[Hashable, RecordedStep] = OrderedDict()

    def prepare(self, plan: StepPlan) -> RecordedStep | None:
        """Return the recorded step that the plan was filled into; None if such a step is not recorded."""
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
        """The recording of steps like this one, if there is one."""
        step = self._steps.get(self._key(plan, StepKind.of(plan)))
        return step and step.recording

    def _key(self, plan: StepPlan, kind: StepKind) -> tuple:
        """All that a recording depends on: the padded sizes first."""
        sizes = plan.num_rows, len(plan.segments)
        if not self.pads:
            counts = [(s.num_draft_tokens + 1, s.wants_head_candidates) for s in plan.segments if s.emits_tokens]
            decided = 0 if kind.is_decode else (sum(n for n, _ in counts), sum(wants for _, wants in counts))
            return sizes, kind, decided, num_threads()
        padded = bucket(*sizes, self._cache.num_rows)
        rows = [len(s.tokens) for s in plan.segments] + padding(sizes, padded)
        return padded, kind, kinds(rows, self._cache.group_size)
