"""The walk in plain PyTorch: one sweep per depth for all trees at once."""

import torch

from euryale.kernels.geometry import StepGeometry


def accept(geometry: StepGeometry, tokens, next_tokens, good, scores) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's public function."""
    is_draft, segment = geometry.parent_rows >= 0, geometry.segment_of_row
    parents = geometry.parent_rows.clamp(min=0)
    fits = tokens == next_tokens[parents]
    fits = is_draft & (fits if good is None else torch.where(good >= 0, good > 0, fits))
    reached = torch.zeros_like(fits)
    roots = geometry.starts[:-1] + geometry.num_new_tokens - 1
    reached[roots] = True
    for _ in range(geometry.max_depth):
        reached = reached | (fits & reached[parents])
    depths = torch.where(reached, geometry.depths, -1)
    ends = reached & (depths == _largest(depths, segment, len(roots))[segment])
    if scores is not None:
        scores = torch.where(ends, scores, -torch.inf)
        ends &= scores == _largest(scores, segment, len(roots))[segment]
    rows = torch.where(ends, torch.arange(len(fits), device=fits.device), len(fits))
    last = torch.full_like(roots, len(fits)).scatter_reduce(0, segment, rows, "amin")
    accepted = torch.zeros_like(fits)
    row = last
    for _ in range(geometry.max_depth):
        accepted[row] = True
        row = torch.where(geometry.parent_rows[row] < 0, row, parents[row])
    return last.to(torch.int32), torch.where(accepted | ~is_draft, geometry.slots, -1)


def _largest(values: torch.Tensor, segment: torch.Tensor, num_segments: int) -> torch.Tensor:
    """The largest value of each segment."""
    out = values.new_empty(num_segments)
    return out.scatter_reduce(0, segment, values, "amax", include_self=False)
