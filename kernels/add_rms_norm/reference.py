"""Residual and RMSNorm in plain PyTorch."""

import torch
import torch.nn.functional as F


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's public function."""
    total = x if residual is None else x + residual
    return F.rms_norm(total, total.shape[-1:], weight, eps), total
