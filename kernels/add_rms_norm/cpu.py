"""Calls the compiled kernel (cpu.h beside this file)."""

import torch

from euryale.kernels import cpu


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's public function."""
    rows, width = x.shape
    normed = cpu.empty(x, rows, width)
    total = x.data_ptr()
    cpu.library().add_rms_norm(
        cpu.DTYPES[x.dtype],
        rows,
        width,
        total,
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        eps,
        normed.data_ptr(),
        total,
    )
    return normed, x
