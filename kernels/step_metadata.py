"""The metadata of one step: positions, page slots and tree structure of its rows, which every kernel reads.

A step has one segment of rows per request. A segment begins with a chain of new tokens: known tokens whose keys and
values are not in the cache yet. Draft tokens follow. They form a tree whose root (node 0) is the last new token and
whose node n is the n-th draft row. Legend: B segments, R rows, W words of ancestor bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch

from euryale.kernels.tables import Tables

_Arguments = ParamSpec("_Arguments")
_Made = TypeVar("_Made")

WORD = 64
MAX_WORDS = 2  # of ancestor bits, for trees of up to 128 nodes


@dataclass(frozen=True, kw_only=True)
class SegmentShape:
    """Host-side shape of one segment: ``num_new_tokens`` rows of known tokens after ``context`` committed tokens;
    ``parents`` int32 [drafts], the parent node of each draft row; ``pages`` int32 [pages] of the request, in order."""

    num_new_tokens: int
    context: int
    parents: np.ndarray
    pages: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows of known tokens and of drafts."""
        return self.num_new_tokens + len(self.parents)


@lru_cache(maxsize=4096)
def tree_tables(parents: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Depths int32 [nodes] and ancestor bits uint64 [nodes, W] of a tree, the root and each node's own bit included.

    ``parents``: the bytes of an int32 array [drafts]. ValueError if a parent does not come before its child.
    """
    nodes = np.frombuffer(parents, dtype=np.int32)
    depths, bits = [0], [1]
    for node, parent in enumerate(nodes.tolist(), start=1):
        if not 0 <= parent < node:
            raise ValueError(f"node {node} of a tree has parent {parent}: parents come before their children")
        depths.append(depths[parent] + 1)
        bits.append(bits[parent] | 1 << node)
    words = -(-len(bits) // WORD)
    low = (1 << WORD) - 1
    table = [[b >> (WORD * w) & low for w in range(words)] for b in bits]
    return np.asarray(depths, dtype=np.int32), np.asarray(table, dtype=np.uint64)


@dataclass(frozen=True)
class _RowTables:
    """What follows from a segment's shape: for its n rows ``places`` (position after the context), ``depths`` and
    ``parents`` (row in the segment, -1 for known tokens), int64 [n]; ``ancestors`` int64 [n, MAX_WORDS], node bits."""

    places: np.ndarray
    depths: np.ndarray
    parents: np.ndarray
    ancestors: np.ndarray


@lru_cache(maxsize=4096)
def _row_tables(num_new_tokens: int, parents: bytes) -> _RowTables:
    node_depths, bits = tree_tables(parents)
    root, drafts = num_new_tokens - 1, len(node_depths) - 1
    if bits.shape[1] > MAX_WORDS:
        raise ValueError(f"a tree has {drafts + 1} nodes: at most {MAX_WORDS * WORD} are supported")
    depths = np.concatenate([np.zeros(root, dtype=np.int64), node_depths])
    places = np.concatenate([np.arange(root), root + node_depths])
    parent_rows = np.concatenate([np.full(num_new_tokens, -1), root + np.frombuffer(parents, dtype=np.int32)])
    ancestors = np.zeros((num_new_tokens + drafts, MAX_WORDS), dtype=np.uint64)
    ancestors[root:, : bits.shape[1]] = bits
    return _RowTables(places.astype(np.int64), depths, parent_rows.astype(np.int64), ancestors.view(np.int64))


@lru_cache(maxsize=512)
def _shape_arrays(shapes: tuple[tuple[int, bytes], ...]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays that follow from the segments' shapes (number of new tokens, parents), and every row's place after
    its context. Equal shapes return the same array objects."""
    tables = [_row_tables(*shape) for shape in shapes]
    counts = [len(t.places) for t in tables]
    starts, of_row = np.cumsum([0, *counts]), np.repeat(np.arange(len(shapes)), counts)
    parents = np.concatenate([t.parents for t in tables])
    arrays = {
        "num_new_tokens": np.asarray([num_new_tokens for num_new_tokens, _ in shapes]),
        "starts": starts,
        "segment_of_row": of_row,
        "parent_rows": np.where(parents < 0, -1, parents + starts[of_row]),
        "depths": np.concatenate([t.depths for t in tables]),
        "ancestors": np.concatenate([t.ancestors for t in tables]),
    }
    return arrays, np.concatenate([t.places for t in tables])


@dataclass(kw_only=True)
class StepMetadata:
    """The metadata on the host and on the device. Tensors are int64 unless said otherwise.

    On the host: ``segments``, ``page_size`` in tokens, ``row_starts`` [B + 1], ``max_depth`` of the trees.

    Per row [R]: ``positions`` for RoPE; ``segment_of_row``; ``parent_rows``, -1 for known tokens; ``depths`` in the
    tree, 0 for known tokens; ``slots`` in the paged cache, page * page_size + offset, -1 if the row has no page;
    ``ancestors`` [R, MAX_WORDS], bits of tree nodes, unused for known tokens.

    Per segment [B]: ``starts`` [B + 1], first rows; ``num_new_tokens``; ``contexts``, committed tokens;
    ``page_starts``, the index of a segment's first page in ``pages``, int32.
    """

    segments: list[SegmentShape]
    page_size: int
    row_starts: list[int]
    max_depth: int
    positions: torch.Tensor
    segment_of_row: torch.Tensor
    parent_rows: torch.Tensor
    depths: torch.Tensor
    slots: torch.Tensor
    ancestors: torch.Tensor
    starts: torch.Tensor
    num_new_tokens: torch.Tensor
    contexts: torch.Tensor
    page_starts: torch.Tensor
    pages: torch.Tensor
    is_refilled: bool = False  # the tensors will hold other steps of the same shape
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False)  # see ``once``

    @property
    def num_rows(self) -> int:
        """Rows of all segments."""
        return self.row_starts[-1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are tensors, by name."""
        return {name: getattr(self, name) for name in _TENSORS}

    @classmethod
    def build(cls, segments: list[SegmentShape], page_size: int, device: torch.device) -> "StepMetadata":
        """Derive everything from the segments' shapes. ValueError for trees that are malformed or too large."""
        arrays = metadata_arrays(segments, page_size)
        return cls.of(segments, page_size, arrays, Tables(arrays, device).tensors)

    @classmethod
    def of(
        cls,
        segments: list[SegmentShape],
        page_size: int,
        arrays: dict[str, np.ndarray],
        tensors: dict[str, torch.Tensor],
        is_refilled: bool = False,
    ) -> "StepMetadata":
        """From ``metadata_arrays`` and device ``tensors`` with the same names."""
        return cls(
            segments=segments,
            page_size=page_size,
            row_starts=arrays["starts"].tolist(),
            max_depth=int(arrays["depths"].max()),
            is_refilled=is_refilled,
            **{name: tensors[name] for name in _TENSORS},
        )

    def once(
        self,
        make: Callable[Concatenate["StepMetadata", _Arguments], _Made],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Made:
        """Return ``make(self, *args, **kwargs)``, called once per step: what a kernel derives for all layers.

        If that has a method ``refill(metadata) -> bool``, it is kept for other steps of the same shape."""
        key = (make, args, tuple(kwargs.items()))
        if key not in self._made:
            self._made[key] = make(self, *args, **kwargs)
        made: _Made = self._made[key]
        return made

    def refill(self, segments: list[SegmentShape], arrays: dict[str, np.ndarray]) -> bool:
        """Take the host's part of another step, whose ``arrays`` the tensors hold already. False if what kernels made
        ``once`` has no room for it."""
        self.segments, self.row_starts = segments, arrays["starts"].tolist()
        self.max_depth = int(arrays["depths"].max())
        self._made = {key: made for key, made in self._made.items() if hasattr(made, "refill")}
        return all(made.refill(self) for made in self._made.values())


_TENSORS = (
    "positions",
    "segment_of_row",
    "parent_rows",
    "depths",
    "slots",
    "ancestors",
    "starts",
    "num_new_tokens",
    "contexts",
    "page_starts",
    "pages",
)


def metadata_arrays(segments: list[SegmentShape], page_size: int) -> dict[str, np.ndarray]:
    """The tensors of a StepMetadata, computed on the host. ValueError for trees that are malformed or too large."""
    arrays, places = _shape_arrays(tuple((s.num_new_tokens, s.parents.tobytes()) for s in segments))
    of_row = arrays["segment_of_row"]
    num_pages, contexts = np.asarray([len(s.pages) for s in segments]), np.asarray([s.context for s in segments])
    page_starts = num_pages.cumsum() - num_pages
    pages = segments[0].pages if len(segments) == 1 else np.concatenate([s.pages for s in segments])
    positions = places + contexts[of_row]
    place, offset = np.divmod(positions, page_size)
    held = num_pages[of_row]
    page = pages[page_starts[of_row] + np.minimum(place, held - 1)]
    return arrays | {
        "contexts": contexts,
        "page_starts": page_starts,
        "pages": pages.astype(np.int32, copy=False),
        "positions": positions,
        "slots": np.where(place < held, page.astype(np.int64) * page_size + offset, -1),
    }
