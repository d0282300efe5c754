"""Who sees whom in one step: the shapes every kernel of a step reads.

Rows of a step lie segment by segment (one segment per request): certain rows first, a chain, then draft rows, a
tree whose root (node 0) is the last certain row and whose node n is the n-th draft row. Legend: R rows, W words of
ancestor bits.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

WORD = 64


@dataclass(frozen=True, kw_only=True)
class SegmentShape:
    """Host-side shape of one segment; ``parents`` int32 [drafts], tree nodes; ``pages`` int32 [pages]."""

    num_certain: int
    context: int
    parents: np.ndarray
    pages: np.ndarray

    @property
    def num_rows(self) -> int:
        return self.num_certain + len(self.parents)


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


@dataclass(frozen=True, kw_only=True)
class StepGeometry:
    """``segments`` on the host; on the device: ``positions`` int64 [R] (context + place in the chain or depth),
    ``segment_of_row`` int64 [R], ``parent_rows`` int64 [R] (-1 for certain rows), ``depths`` int64 [R] (0 for
    certain rows), ``slots`` int64 [R] (where in the paged cache a row goes if it is committed: page * page_size +
    offset, -1 where the row can never be)."""

    segments: list[SegmentShape]
    page_size: int
    row_starts: list[int]
    positions: torch.Tensor
    segment_of_row: torch.Tensor
    parent_rows: torch.Tensor
    depths: torch.Tensor
    slots: torch.Tensor
    max_depth: int
    prepared: dict = field(default_factory=dict)  # what a kernel derives once per step instead of once per layer

    @property
    def num_rows(self) -> int:
        return self.row_starts[-1]

    def on_buffers(self, positions: torch.Tensor, step) -> "StepGeometry":
        """The same on buffers that a recording keeps: ``positions``, and what the CPU's attention reads."""
        return dataclasses.replace(self, positions=positions, prepared={"tree_attention.cpu": step})

    @classmethod
    def build(cls, segments: list[SegmentShape], page_size: int, device: torch.device) -> "StepGeometry":
        """Derive everything from the segments' shapes."""
        starts = np.cumsum([0] + [s.num_rows for s in segments])
        num_rows = int(starts[-1])
        host = {name: np.zeros(num_rows, dtype=np.int64) for name in ("positions", "of_row", "depths")}
        parent_rows = np.full(num_rows, -1, dtype=np.int64)
        slots = np.full(num_rows, -1, dtype=np.int64)
        tables = [tree_tables(s.parents.tobytes()) for s in segments]
        for i, (segment, (depths, _)) in enumerate(zip(segments, tables, strict=True)):
            first, root, stop = int(starts[i]), int(starts[i]) + segment.num_certain - 1, int(starts[i + 1])
            host["of_row"][first:stop] = i
            host["depths"][root:stop] = depths
            places = np.concatenate([np.arange(segment.num_certain), segment.num_certain - 1 + depths[1:]])
            positions = segment.context + places
            host["positions"][first:stop] = positions
            parent_rows[root + 1 : stop] = root + segment.parents
            fits = positions < len(segment.pages) * page_size
            held = positions[fits]
            slots[first:stop][fits] = segment.pages[held // page_size].astype(np.int64) * page_size + held % page_size
        return cls(
            segments=segments,
            page_size=page_size,
            row_starts=starts.tolist(),
            positions=torch.from_numpy(host["positions"]).to(device),
            segment_of_row=torch.from_numpy(host["of_row"]).to(device),
            parent_rows=torch.from_numpy(parent_rows).to(device),
            depths=torch.from_numpy(host["depths"]).to(device),
            slots=torch.from_numpy(slots).to(device),
            max_depth=int(host["depths"].max()),
        )
