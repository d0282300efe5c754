"""Splits a step for Triton's tree attention into items: a segment, a block of query rows, and a split of the keys.

A query row is one head of one row of the step; the heads of a KV group are adjacent. The keys of a segment are its
context, then its own rows. Tile sizes depend on the segment alone, so that a row's result does not depend on other
requests. A block of query rows with one split writes to the output; others write partial results to be merged.
"""

from dataclasses import dataclass

import numpy as np
import torch

from euryale.kernels.step_metadata import StepMetadata
from euryale.kernels.tables import Tables

FIELDS, MERGE_FIELDS = 8, 5  # per item and per merge


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's work: blocks of ``rows`` query rows and ``keys`` keys, at most ``split`` keys in all."""

    rows: int
    keys: int
    split: int
    num_warps: int
    num_stages: int


# Segments of up to 16 and up to 512 query rows, and larger ones. Few query rows make few programs, so short splits have
# to fill the GPU. A prompt chunk fills it without splits, and its partial results would be large.
_LIMITS = (16, 512)
# By the head dimension, rounded up to a power of two. Keys and values of all stages fit into 99 kB, the shared memory
# of small GPUs.
_TILES = {
    64: (Tile(16, 128, 512, 4, 2), Tile(64, 64, 1024, 4, 2), Tile(128, 64, 16384, 8, 2)),
    128: (Tile(16, 64, 512, 4, 2), Tile(64, 32, 1024, 4, 2), Tile(128, 32, 16384, 8, 2)),
    256: (Tile(16, 32, 512, 4, 2), Tile(64, 32, 1024, 8, 2), Tile(64, 32, 16384, 8, 2)),
}
# For tests: exact float32 products, without tensor cores.
_TILES_FLOAT32 = (Tile(16, 32, 512, 8, 1), Tile(16, 32, 1024, 8, 1), Tile(16, 32, 16384, 8, 1))


def kinds(rows: list[int], group: int) -> tuple[int, ...]:
    """The tile kinds that segments with these numbers of ``rows`` use, with ``group`` query heads per KV head."""
    return tuple(np.unique(np.searchsorted(_LIMITS, np.asarray(rows) * group)).tolist())


@dataclass(frozen=True)
class _Plan:
    """One launch.

    ``items`` int32 [n, 8]: the segment's first row, number of rows, number of new tokens, context and first page; the
    block's first query row; the index of the split; the index of the partial result (-1: write to the output).
    ``merges`` int32 [m, 5]: the segment's first row; the block's first query row; the segment's query rows; the first
    partial result and their number. ``num_partials``: items that write partial results.
    """

    items: np.ndarray
    merges: np.ndarray
    num_partials: int


class Work:
    """A plan on the device: ``tile``, ``items``, ``merges``, and ``counts`` int32 [2], the numbers of valid items and
    merges. ``num_partials``: the capacity for partial results."""

    def __init__(self, tile: Tile, plan: _Plan, device: torch.device, has_room: bool) -> None:
        self.tile = tile
        arrays, room = self._arrays(plan), {}
        self._capacity = [len(plan.items), len(plan.merges), plan.num_partials]
        if has_room:  # powers of two, so that a growing context seldom needs another recording
            self._capacity = [n and 1 << max(n - 1, 7).bit_length() for n in self._capacity]
            room = {"items": self._capacity[0] * FIELDS, "merges": self._capacity[1] * MERGE_FIELDS}
        self._tables = Tables(arrays, device, room)
        tensors = self._tables.tensors
        self.items = tensors["items"].view(self._capacity[0], FIELDS)
        self.merges = tensors["merges"].view(self._capacity[1], MERGE_FIELDS)
        self.counts, self.num_partials = tensors["counts"], self._capacity[2]

    def refill(self, plan: _Plan) -> bool:
        """Replace the plan by another of the same tile. False if it exceeds the capacity."""
        sizes = (len(plan.items), len(plan.merges), plan.num_partials)
        if any(size > most for size, most in zip(sizes, self._capacity, strict=True)):
            return False
        self._tables.fill(self._arrays(plan))
        return True

    @staticmethod
    def _arrays(plan: _Plan) -> dict[str, np.ndarray]:
        counts = np.asarray([len(plan.items), len(plan.merges)], dtype=np.int32)
        return {"counts": counts, "items": plan.items.reshape(-1), "merges": plan.merges.reshape(-1)}


class WorkList:
    """The launches of a step, ``works``: one per tile kind that occurs.

    ``group``: query heads per KV head. ``dim``: the head dimension, rounded up to a power of two.
    """

    def __init__(
        self, metadata: StepMetadata, group: int, dim: int, is_float32: bool, window: int | None, device: torch.device
    ) -> None:
        self._tiles = _TILES_FLOAT32 if is_float32 else _TILES[min(max(dim, 64), 256)]
        self._group, self._window = group, window or 0
        plans = self._plans(metadata)
        self._kinds = list(plans)
        self.works = [Work(self._tiles[k], plan, device, metadata.is_refilled) for k, plan in plans.items()]

    def refill(self, metadata: StepMetadata) -> bool:
        """Replace the step by another. False if it needs other tiles or exceeds the capacity."""
        plans = self._plans(metadata)
        if list(plans) != self._kinds:
            return False
        return all(work.refill(plan) for work, plan in zip(self.works, plans.values(), strict=True))

    def _plans(self, metadata: StepMetadata) -> dict[int, _Plan]:
        segments = metadata.segments
        num_pages = np.asarray([len(s.pages) for s in segments])
        counts = np.asarray([s.num_rows for s in segments])
        columns = (
            np.asarray(metadata.row_starts[:-1]),
            counts,
            np.asarray([s.num_new_tokens for s in segments]),
            np.asarray([s.context for s in segments]),
            num_pages.cumsum() - num_pages,
        )
        table, of_segment = np.stack(columns, axis=1), np.searchsorted(_LIMITS, counts * self._group)
        found = np.unique(of_segment).tolist()
        return {k: _plan(table[of_segment == k], self._tiles[k], self._group, self._window) for k in found}


def work_list(
    metadata: StepMetadata, group: int, dim: int, is_float32: bool, window: int | None, device: torch.device
) -> list[Work]:
    """The launches of a step, made once per step (see WorkList)."""
    return metadata.once(WorkList, group, dim, is_float32, window, device).works


def _plan(table: np.ndarray, tile: Tile, group: int, window: int) -> _Plan:
    segment, block = _counted(-(-table[:, 1] * group // tile.rows))
    start, count, num_new, context, _ = table[segment].T
    first = block * tile.rows
    # No row attends to later rows. A block's lowest position is that of its first row or of the first draft.
    end = context + (np.minimum(first + tile.rows, count * group) - 1) // group + 1
    lowest = context + np.minimum(first // group, num_new)
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
    """For ``counts[i]`` things of owner i: the owner of each thing, and its index among its owner's."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (counts.cumsum() - counts)[owner]
