"""The walk in plain PyTorch: one sweep per depth for all trees at once."""

import torch

from euryale.kernels.geometry import StepGeometry


def accept(
    geometry: StepGeometry, roots: torch.Tensor, fits: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's public function."""
    parents, segment = geometry.parent_rows.clamp(min=0), geometry.segment_of_row
    reached = torch.zeros_like(fits)
    reached[roots] = True
    for _ in range(geometry.max_depth):
        reached = reached | (fits & reached[parents])
    depths = torch.where(reached, geometry.depths, -1)
    ends = reached & (depths == _largest(depths, segment, len(roots))[segment])
    scores = torch.where(ends, scores, -torch.inf)
    ends &= scores == _largest(scores, segment, len(roots))[segment]
    rows = torch.where(ends, torch.arange(len(fits), device=fits.device), len(fits))
    last = torch.full_like(roots, len(fits)).scatter_reduce(0, segment, rows, "amin")
    accepted = torch.zeros_like(fits)
    row = last
    for _ in range(geometry.max_depth):
        accepted[row] = True
        row = torch.where(geometry.parent_rows[row] < 0, row, parents[row])
    return last, accepted & (geometry.parent_rows >= 0)


def _largest(values: torch.Tensor, segment: torch.Tensor, num_segments: int) -> torch.Tensor:
    """The largest value of each segment."""
    out = values.new_empty(num_segments)
    return out.scatter_reduce(0, segment, values, "amax", include_self=False)
