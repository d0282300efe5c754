"""Adds the residual and applies RMSNorm."""

import torch

from euryale.kernels.backend import implementation


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds ``residual`` [R, D] (None: nothing) to ``x`` [R, D] and normalises the sum with ``weight`` [D].

    All tensors are float32 or all are bfloat16. Returns the RMSNorm of the sum and the sum, both [R, D]. The sum may
    overwrite ``x`` or ``residual``. ``eps`` is added to the mean square.
    """
    return implementation("add_rms_norm", x.device).add_rms_norm(x, residual, weight, eps)
