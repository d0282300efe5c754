"""Which steps are replayed instead of being called kernel by kernel, and the batches they read.

On a CPU a step is recorded for just its number of rows and requests: padding would cost what it saves. On a GPU
decoding steps are padded to the next bucket, and replay as one CUDA graph from the embedding to the candidates.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from euryale.kernels import graph
from euryale.kernels.tree_attention.work_list import kinds
from euryale.parallel.group import Group
from euryale.runtime.kv_cache import KVCache
from euryale.runtime.step_batch import StepBatch, StepKind, padding
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


@dataclass
class _Entry:
    batch: StepBatch
    recording: graph.Recording | graph.CudaGraph | None = None


class StepGraphs:
    """Recordings by the shapes of their steps; the ``max_graphs`` used last are kept. Steps of more than ``max_rows``
    rows run eagerly: there the kernels' own work outweighs the calls. ``pads``: decoding steps only, padded to buckets,
    as on a GPU."""

    def __init__(self, cache: KVCache, group: Group, max_rows: int, pads: bool, max_graphs: int = 32) -> None:
        self._cache, self._group, self._device = cache, group, group.device
        self._max_rows, self._max_graphs, self.pads = max_rows, max_graphs, pads
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def batch_for(self, plan: StepPlan) -> StepBatch | None:
        """The plan as the batch that ``run`` takes; None if such a step is not recorded."""
        room = self._cache.num_pages
        is_large = plan.num_rows > self._max_rows or sum(len(s.pages) for s in plan.segments) > room
        if is_large or not graph.can_record(self._device):
            return None
        kind = StepKind.of(plan)
        if self.pads and not kind.is_decode:
            return None
        key = self._key(plan, kind)
        entry = self._entries.get(key)
        if entry is not None and entry.batch.refill(plan):
            self._entries.move_to_end(key)
            return entry.batch
        if entry is None and len(self._entries) >= self._max_graphs:
            self._entries.popitem(last=False)
        batch = StepBatch(plan, self._cache.page_size, self._device, padded=key[0], pages=room)
        self._entries[key] = _Entry(batch)
        self._entries.move_to_end(key)
        return batch

    def run(self, batch: StepBatch, function: Callable[[StepBatch], tuple]) -> tuple:
        """``function`` of the batch that ``batch_for`` gave last, recorded or replayed; valid until the next call."""
        entry = next(reversed(self._entries.values()))
        assert entry.batch is batch, "another batch was filled in between"
        if entry.recording is None:
            entry.recording = graph.record(lambda: function(batch), self._device)
        else:
            self._group.check(entry.recording.replay())
        return entry.recording.out

    def recording(self, plan: StepPlan) -> graph.Recording | graph.CudaGraph | None:
        """The recording of steps like this one, if there is one."""
        entry = self._entries.get(self._key(plan, StepKind.of(plan)))
        return entry and entry.recording

    def _key(self, plan: StepPlan, kind: StepKind) -> tuple:
        """All that a recording depends on: the padded sizes first."""
        sizes = plan.num_rows, len(plan.segments)
        if not self.pads:
            counts = [(s.num_draft_tokens + 1, s.wants_head_candidates) for s in plan.segments if s.emits_tokens]
            decided = 0 if kind.is_decode else (sum(n for n, _ in counts), sum(wants for _, wants in counts))
            return sizes, kind, decided, torch.get_num_threads()
        padded = bucket(*sizes, self._cache.num_rows)
        rows = [len(s.tokens) for s in plan.segments] + padding(sizes, padded)
        return padded, kind, kinds(rows, self._cache.group_size)
