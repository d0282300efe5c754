"""Who sees whom in one step: the shapes every kernel of a step reads.

Rows of a step lie segment by segment (one segment per request): rows of known tokens first, a chain, then draft rows, a
tree whose root (node 0) is the last row of a known token and whose node n is the n-th draft row. Legend: R rows, W
words of ancestor bits.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from euryale.kernels.tables import Tables

WORD = 64
MAX_WORDS = 2  # of ancestor bits: trees of up to 128 nodes


@dataclass(frozen=True, kw_only=True)
class SegmentShape:
    """Host-side shape of one segment; ``parents`` int32 [drafts], tree nodes; ``pages`` int32 [pages]."""

    num_new_tokens: int
    context: int
    parents: np.ndarray
    pages: np.ndarray

    @property
    def num_rows(self) -> int:
        return self.num_new_tokens + len(self.parents)


@lru_cache(maxsize=4096)
def tree_tables(parents: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Depths int32 [nodes] and ancestor bits uint64 [nodes, W] (own bit set) of a tree, root included, from the
    int32 ``parents`` of its drafts."""
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
    """What a segment's shape alone says of its rows: ``places`` after the context, ``depths``, ``parents`` (rows of the
    segment, -1 for rows of known tokens), each int64 [n]; ``ancestors`` int64 [n, MAX_WORDS], bits of the tree's
    nodes."""

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
    """What the segments' shapes (rows of known tokens, parents) alone say of a step, and every row's place after its
    context. The arrays are the same objects whenever the shapes are the same."""
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
class StepGeometry:
    """``segments``, ``row_starts`` [B + 1] and ``max_depth`` on the host. On the device, int64 where nothing else is
    said:

    of rows: ``positions`` [R] (context + place in the chain or depth), ``segment_of_row`` [R], ``parent_rows`` [R] (-1
    for rows of known tokens), ``depths`` [R] (0 for rows of known tokens), ``slots`` [R] (where in the paged cache a
    row goes if it is committed: page * page_size + offset, -1 where the row can never be), ``ancestors`` [R, MAX_WORDS]
    (bits of the tree's nodes, unused for rows of known tokens); of segments: ``starts`` [B + 1], ``num_new_tokens``,
    ``contexts`` and ``page_starts`` [B], where a segment's pages begin in ``pages`` int32."""

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
    is_refilled: bool = False  # its tensors will hold other steps of the same shape
    prepared: dict = field(default_factory=dict)  # what a kernel derives once per step instead of once per layer

    @property
    def num_rows(self) -> int:
        return self.row_starts[-1]

    @classmethod
    def build(cls, segments: list[SegmentShape], page_size: int, device: torch.device) -> "StepGeometry":
        """Derive everything from the segments' shapes."""
        arrays = geometry_arrays(segments, page_size)
        return cls.of(segments, page_size, arrays, Tables(arrays, device).tensors)

    @classmethod
    def of(cls, segments, page_size: int, arrays: dict[str, np.ndarray], tensors, **options) -> "StepGeometry":
        """From ``geometry_arrays`` and ``tensors`` of these names."""
        options |= {"row_starts": arrays["starts"].tolist(), "max_depth": int(arrays["depths"].max())}
        options |= {name: tensors[name] for name in GEOMETRY_ARRAYS}
        return cls(segments=segments, page_size=page_size, **options)

    def refill(self, segments: list[SegmentShape], arrays: dict[str, np.ndarray]) -> bool:
        """Take what the host knows of another step, whose arrays of the same shapes are in the tensors' place; False if
        what was prepared has no room for it."""
        self.segments, self.row_starts = segments, arrays["starts"].tolist()
        self.max_depth = int(arrays["depths"].max())
        self.prepared = {key: made for key, made in self.prepared.items() if hasattr(made, "refill")}
        return all(made.refill(self) for made in self.prepared.values())


GEOMETRY_ARRAYS = (
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


def geometry_arrays(segments: list[SegmentShape], page_size: int) -> dict[str, np.ndarray]:
    """The tensors of a StepGeometry, as the host makes them."""
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
