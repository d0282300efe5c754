"""The walk in Triton, one program per tree: a node is reached where all bits of its ancestors are among the fitting."""

import torch
import triton
import triton.language as tl

from euryale.kernels.geometry import MAX_WORDS, WORD, StepGeometry

_WORD = tl.constexpr(WORD)
_NODES = tl.constexpr(MAX_WORDS * WORD)


def accept(
    geometry: StepGeometry, roots: torch.Tensor, fits: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's public function."""
    last, accepted = torch.empty_like(roots), torch.zeros_like(fits)
    tables = geometry.starts, geometry.depths, geometry.ancestors
    _walk[(len(roots),)](*tables, roots, fits, scores, last, accepted, num_warps=1)
    return last, accepted


@triton.jit
def _walk(starts, depths, ancestors, roots, fits, scores, last, accepted):
    segment = tl.program_id(0)
    root, end = tl.load(roots + segment), tl.load(starts + segment + 1)
    nodes = tl.arange(0, _NODES)
    rows = root + nodes
    exists = rows < end
    is_draft = exists & (nodes > 0)
    fit = (nodes == 0) | (tl.load(fits + rows, mask=is_draft, other=0) != 0)
    # Distinct bits, so their sum is the word that holds them all.
    bits = tl.where(fit, tl.full((_NODES,), 1, tl.int64) << (nodes % _WORD).to(tl.int64), 0)
    misfits_low = ~tl.sum(tl.where(nodes < _WORD, bits, 0), axis=0)
    misfits_high = ~tl.sum(tl.where(nodes < _WORD, 0, bits), axis=0)
    low = tl.load(ancestors + rows * 2, mask=exists, other=0)
    high = tl.load(ancestors + rows * 2 + 1, mask=exists, other=0)
    reached = exists & ((nodes == 0) | (((low & misfits_low) | (high & misfits_high)) == 0))

    depth = tl.where(reached, tl.load(depths + rows, mask=exists, other=0), -1)
    ends = reached & (depth == tl.max(depth, axis=0))
    score = tl.where(ends, tl.load(scores + rows, mask=exists, other=0.0), float("-inf"))
    ends &= score == tl.max(score, axis=0)
    node = tl.min(tl.where(ends, nodes, _NODES), axis=0)
    tl.store(last + segment, root + node)

    path_low, path_high = tl.load(ancestors + (root + node) * 2), tl.load(ancestors + (root + node) * 2 + 1)
    path = tl.where(nodes < _WORD, path_low, path_high) >> (nodes % _WORD).to(tl.int64)
    # The root is on every path, whatever its own row of bits says.
    tl.store(accepted + rows, (node > 0) & ((path & 1) != 0), mask=is_draft)
