"""The accepted paths in plain PyTorch: one sweep per depth for all trees at once."""

import torch

from euryale.kernels.step_metadata import StepMetadata


def accept(
    metadata: StepMetadata,
    tokens: torch.Tensor,
    next_tokens: torch.Tensor,
    good: torch.Tensor | None,
    scores: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's public function."""
    is_draft, segment = metadata.parent_rows >= 0, metadata.segment_of_row
    parents = metadata.parent_rows.clamp(min=0)
    fits = tokens == next_tokens[parents]
    fits = is_draft & (fits if good is None else torch.where(good >= 0, good > 0, fits))
    reached = torch.zeros_like(fits)
    roots = metadata.starts[:-1] + metadata.num_new_tokens - 1
    reached[roots] = True
    for _ in range(metadata.max_depth):
        reached = reached | (fits & reached[parents])
    depths = torch.where(reached, metadata.depths, -1)
    ends = reached & (depths == _largest(depths, segment, len(roots))[segment])
    if scores is not None:
        scores = torch.where(ends, scores, -torch.inf)
        ends &= scores == _largest(scores, segment, len(roots))[segment]
    rows = torch.where(ends, torch.arange(len(fits), device=fits.device), len(fits))
    last_rows = torch.full_like(roots, len(fits)).scatter_reduce(0, segment, rows, "amin")
    accepted = torch.zeros_like(fits)
    row = last_rows
    for _ in range(metadata.max_depth):
        accepted[row] = True
        row = torch.where(metadata.parent_rows[row] < 0, row, parents[row])
    return last_rows.to(torch.int32), torch.where(accepted | ~is_draft, metadata.slots, -1)


def _largest(values: torch.Tensor, segment: torch.Tensor, num_segments: int) -> torch.Tensor:
    """The largest value of each segment."""
    out = values.new_empty(num_segments)
    return out.scatter_reduce(0, segment, values, "amax", include_self=False)
