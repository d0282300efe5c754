"""The walk by the compiled kernel (cpu.cpp beside this file)."""

import torch

from euryale.kernels import cpu
from euryale.kernels.geometry import StepGeometry


def accept(
    geometry: StepGeometry, roots: torch.Tensor, fits: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's public function."""
    last, accepted = torch.empty_like(roots), torch.empty_like(fits)
    cpu.library().accept(
        len(fits),
        len(roots),
        geometry.parent_rows.data_ptr(),
        geometry.segment_of_row.data_ptr(),
        geometry.depths.data_ptr(),
        roots.data_ptr(),
        fits.data_ptr(),
        scores.data_ptr(),
        last.data_ptr(),
        accepted.data_ptr(),
    )
    return last, accepted
