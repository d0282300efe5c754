"""Residual addition and RMSNorm."""

import torch

from euryale.kernels.backend import implementation


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [R, D] plus ``residual`` [R, D] (None: nothing to add), and the sum's RMSNorm with ``weight`` [D]: the
    norm and the sum, both [R, D]. The sum may take the place of ``x`` or of ``residual``."""
    return implementation("add_rms_norm", x.device).add_rms_norm(x, residual, weight, eps)
