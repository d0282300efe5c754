"""The walk in Triton, one program per tree: a node is reached where all bits of its ancestors are among the fitting."""

import torch
import triton
import triton.language as tl

from euryale.kernels.geometry import MAX_WORDS, WORD, StepGeometry

_WORD = tl.constexpr(WORD)
_NODES = tl.constexpr(MAX_WORDS * WORD)


def accept(geometry: StepGeometry, tokens, next_tokens, good, scores) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's public function."""
    last = tokens.new_empty(len(geometry.num_new_tokens))
    # Certain rows are kept whatever the trees say; the kernel adds the drafts.
    kept = torch.where(geometry.parent_rows < 0, geometry.slots, -1)
    tables = geometry.starts, geometry.num_new_tokens, geometry.parent_rows, geometry.depths, geometry.ancestors
    _walk[(len(last),)](*tables, geometry.slots, tokens, next_tokens, good, scores, last, kept, num_warps=1)
    return last, kept


@triton.jit
def _walk(
    starts,
    num_new_tokens,
    parent_rows,
    depths,
    ancestors,
    slots,
    tokens,
    next_tokens,
    good,
    scores,
    last,
    kept,
):
    segment = tl.program_id(0)
    root, end = tl.load(starts + segment) + tl.load(num_new_tokens + segment) - 1, tl.load(starts + segment + 1)
    nodes = tl.arange(0, _NODES)
    rows = root + nodes
    exists = rows < end
    is_draft = exists & (nodes > 0)
    parents = tl.load(parent_rows + rows, mask=is_draft, other=0)
    wanted = tl.load(next_tokens + parents, mask=is_draft, other=0)
    fit = tl.load(tokens + rows, mask=is_draft, other=0) == wanted
    if good is not None:
        said = tl.load(good + rows, mask=is_draft, other=-1)
        fit = tl.where(said >= 0, said > 0, fit)
    fit = (nodes == 0) | (is_draft & fit)
    # Distinct bits, so their sum is the word that holds them all.
    bits = tl.where(fit, tl.full((_NODES,), 1, tl.int64) << (nodes % _WORD).to(tl.int64), 0)
    misfits_low = ~tl.sum(tl.where(nodes < _WORD, bits, 0), axis=0)
    misfits_high = ~tl.sum(tl.where(nodes < _WORD, 0, bits), axis=0)
    low = tl.load(ancestors + rows * 2, mask=exists, other=0)
    high = tl.load(ancestors + rows * 2 + 1, mask=exists, other=0)
    reached = exists & ((nodes == 0) | (((low & misfits_low) | (high & misfits_high)) == 0))

    depth = tl.where(reached, tl.load(depths + rows, mask=exists, other=0), -1)
    ends = reached & (depth == tl.max(depth, axis=0))
    if scores is not None:
        score = tl.where(ends, tl.load(scores + rows, mask=exists, other=0.0), float("-inf"))
        ends &= score == tl.max(score, axis=0)
    node = tl.min(tl.where(ends, nodes, _NODES), axis=0)
    tl.store(last + segment, (root + node).to(tl.int32))

    path_low, path_high = tl.load(ancestors + (root + node) * 2), tl.load(ancestors + (root + node) * 2 + 1)
    path = tl.where(nodes < _WORD, path_low, path_high) >> (nodes % _WORD).to(tl.int64)
    # The root is on every path, whatever its own row of bits says.
    is_on_path = is_draft & (node > 0) & ((path & 1) != 0)
    tl.store(kept + rows, tl.load(slots + rows, mask=is_on_path, other=-1), mask=is_on_path)
