"""Where Triton's tree attention cuts a step: items of (segment, block of query rows, split of the keys).

A query row is one head of one step row; the heads of a kv group lie together. The keys of a segment are its context
and then its own rows. Sizes come from a table, by the segment alone, so that a row's result does not depend on its
neighbours. A block of query rows with one split goes straight to the output, others leave partial results to merge.
"""

from dataclasses import dataclass

import numpy as np
import torch

from euryale.kernels.geometry import StepGeometry
from euryale.kernels.tables import Tables

FIELDS, MERGE_FIELDS = 8, 5  # of an item and of a merge


@dataclass(frozen=True)
class Tile:
    """How segments of some number of query rows are cut: ``rows`` query rows and ``keys`` at a time, at most ``split``
    keys by one program."""

    rows: int
    keys: int
    split: int
    num_warps: int
    num_stages: int


# Segments of up to 16 and up to 512 query rows, and larger ones: few query rows make few programs, so that short
# splits have to fill the GPU; a prompt chunk fills it by itself, and its partial results would be large.
_LIMITS = (16, 512)
# By the head dimension, rounded up to a power of two. Keys and values of all stages fit into the 99 kB of shared
# memory of small GPUs.
_TILES = {
    64: (Tile(16, 128, 512, 4, 2), Tile(64, 64, 1024, 4, 2), Tile(128, 64, 16384, 8, 2)),
    128: (Tile(16, 64, 512, 4, 2), Tile(64, 32, 1024, 4, 2), Tile(128, 32, 16384, 8, 2)),
    256: (Tile(16, 32, 512, 4, 2), Tile(64, 32, 1024, 8, 2), Tile(64, 32, 16384, 8, 2)),
}
# float32 products are exact, without tensor cores: they are for tests, not for speed.
_TILES_FLOAT32 = (Tile(16, 32, 512, 8, 1), Tile(16, 32, 1024, 8, 1), Tile(16, 32, 16384, 8, 1))


def kinds(rows: list[int], group: int) -> tuple[int, ...]:
    """Which tiles segments of so many ``rows`` take, with ``group`` heads per kv head."""
    return tuple(np.unique(np.searchsorted(_LIMITS, np.asarray(rows) * group)).tolist())


@dataclass(frozen=True)
class _Plan:
    """What one launch does. ``items`` int32 [n, 8]: a segment's first row, its rows, its rows of known tokens, its
    context, where its pages begin; the block's first query row; which split of the keys; where its partial results go,
    -1: straight to the output. ``merges`` int32 [m, 5]: a segment's first row; the block's first query row; the
    segment's query rows; the first partial result and how many. ``num_partials`` of the items leave partial results."""

    items: np.ndarray
    merges: np.ndarray
    num_partials: int


class Work:
    """A plan on the device: ``tile``, ``items``, ``merges``, and ``counts`` int32 [2], how many of both there are; what
    is beyond these is room for other steps. ``num_partials``: partial results that there is room for."""

    def __init__(self, tile: Tile, plan: _Plan, device: torch.device, has_room: bool) -> None:
        self.tile = tile
        arrays, room = self._arrays(plan), {}
        self._most = (len(plan.items), len(plan.merges), plan.num_partials)
        if has_room:  # powers of two, so that a growing context seldom needs another recording
            self._most = tuple(n and 1 << max(n - 1, 7).bit_length() for n in self._most)
            room = {"items": self._most[0] * FIELDS, "merges": self._most[1] * MERGE_FIELDS}
        self._tables = Tables(arrays, device, room)
        tensors = self._tables.tensors
        self.items = tensors["items"].view(self._most[0], FIELDS)
        self.merges = tensors["merges"].view(self._most[1], MERGE_FIELDS)
        self.counts, self.num_partials = tensors["counts"], self._most[2]

    def refill(self, plan: _Plan) -> bool:
        """Take another plan of this tile; False if there is no room."""
        sizes = (len(plan.items), len(plan.merges), plan.num_partials)
        if any(size > most for size, most in zip(sizes, self._most, strict=True)):
            return False
        self._tables.fill(self._arrays(plan))
        return True

    @staticmethod
    def _arrays(plan: _Plan) -> dict[str, np.ndarray]:
        counts = np.asarray([len(plan.items), len(plan.merges)], dtype=np.int32)
        return {"counts": counts, "items": plan.items.reshape(-1), "merges": plan.merges.reshape(-1)}


class WorkList:
    """The launches of a step, ``works``: one per size of tile in it, for ``group`` heads per kv head and heads of
    ``dim`` places, a power of two."""

    def __init__(
        self, geometry: StepGeometry, group: int, dim: int, is_float32: bool, window: int | None, device: torch.device
    ) -> None:
        self._tiles = _TILES_FLOAT32 if is_float32 else _TILES[min(max(dim, 64), 256)]
        self._group, self._window = group, window or 0
        plans = self._plans(geometry)
        self._kinds = list(plans)
        self.works = [Work(self._tiles[k], plan, device, geometry.is_refilled) for k, plan in plans.items()]

    def refill(self, geometry: StepGeometry) -> bool:
        """Take another step; False if there is no room for it."""
        plans = self._plans(geometry)
        if list(plans) != self._kinds:
            return False
        return all(work.refill(plan) for work, plan in zip(self.works, plans.values(), strict=True))

    def _plans(self, geometry: StepGeometry) -> dict[int, _Plan]:
        segments = geometry.segments
        num_pages = np.asarray([len(s.pages) for s in segments])
        counts = np.asarray([s.num_rows for s in segments])
        columns = (
            np.asarray(geometry.row_starts[:-1]),
            counts,
            np.asarray([s.num_new_tokens for s in segments]),
            np.asarray([s.context for s in segments]),
            num_pages.cumsum() - num_pages,
        )
        table, of_segment = np.stack(columns, axis=1), np.searchsorted(_LIMITS, counts * self._group)
        found = np.unique(of_segment).tolist()
        return {k: _plan(table[of_segment == k], self._tiles[k], self._group, self._window) for k in found}


def work_list(
    geometry: StepGeometry, group: int, dim: int, is_float32: bool, window: int | None, device: torch.device
) -> list[Work]:
    """The launches of a step, made once per step (see WorkList)."""
    key = ("tree_attention.triton", group, dim, is_float32, window)
    if key not in geometry.prepared:
        geometry.prepared[key] = WorkList(geometry, group, dim, is_float32, window, device)
    return geometry.prepared[key].works


def _plan(table: np.ndarray, tile: Tile, group: int, window: int) -> _Plan:
    segment, block = _counted(-(-table[:, 1] * group // tile.rows))
    start, count, certain, context, _ = table[segment].T
    first = block * tile.rows
    # A row sees no row after it. The lowest position of a block is that of its first row, or of the first draft.
    end = context + (np.minimum(first + tile.rows, count * group) - 1) // group + 1
    lowest = context + np.minimum(first // group, certain)
    first_split = np.maximum(lowest - window + 1, 0) // tile.split if window else np.zeros_like(end)
    num_splits = -(-end // tile.split) - first_split
    is_split = num_splits > 1
    partials = np.cumsum(num_splits * is_split)
    partial = partials - num_splits * is_split
    of_item, split = _counted(num_splits)
    place = np.where(is_split[of_item], partial[of_item] + split, -1)
    fields = (table[segment[of_item]], first[of_item], first_split[of_item] + split, place)
    merges = np.column_stack((start, first, count * group, partial, num_splits))[is_split]
    return _Plan(np.column_stack(fields).astype(np.int32), merges.astype(np.int32), int(partials[-1]))


def _counted(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of things of which there are ``counts`` per owner: the owner of each, and which of its owner's it is."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (counts.cumsum() - counts)[owner]
