"""The accepted paths in Triton, one program per tree: a node is reached if all of its ancestors match."""

import torch
import triton
import triton.language as tl

from euryale.kernels.step_metadata import MAX_WORDS, WORD, StepMetadata

_WORD = tl.constexpr(WORD)
_NODES = tl.constexpr(MAX_WORDS * WORD)


def accept(
    metadata: StepMetadata,
    tokens: torch.Tensor,
    next_tokens: torch.Tensor,
    good: torch.Tensor | None,
    scores: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's public function."""
    last_rows = tokens.new_empty(len(metadata.num_new_tokens))
    # Rows of known tokens are committed in any case; the kernel adds the drafts.
    commit_slots = torch.where(metadata.parent_rows < 0, metadata.slots, -1)
    tables = metadata.starts, metadata.num_new_tokens, metadata.parent_rows, metadata.depths, metadata.ancestors
    _walk[(len(last_rows),)](
        *tables, metadata.slots, tokens, next_tokens, good, scores, last_rows, commit_slots, num_warps=1
    )
    return last_rows, commit_slots


@triton.jit
def _walk(
    starts: tl.tensor,
    num_new_tokens: tl.tensor,
    parent_rows: tl.tensor,
    depths: tl.tensor,
    ancestors: tl.tensor,
    slots: tl.tensor,
    tokens: tl.tensor,
    next_tokens: tl.tensor,
    good: tl.tensor | None,
    scores: tl.tensor | None,
    last_rows: tl.tensor,
    commit_slots: tl.tensor,
) -> None:
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
    # The bits are distinct, so their sum is the word that has all of them set.
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
    tl.store(last_rows + segment, (root + node).to(tl.int32))

    path_low, path_high = tl.load(ancestors + (root + node) * 2), tl.load(ancestors + (root + node) * 2 + 1)
    path = tl.where(nodes < _WORD, path_low, path_high) >> (nodes % _WORD).to(tl.int64)
    # If no draft is accepted, the path is the root alone, whose ancestor bits are unused.
    is_on_path = is_draft & (node > 0) & ((path & 1) != 0)
    tl.store(commit_slots + rows, tl.load(slots + rows, mask=is_on_path, other=-1), mask=is_on_path)
