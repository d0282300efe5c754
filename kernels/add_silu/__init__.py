"""The residual connection of Medusa heads: x + SiLU(y)."""

import torch

from euryale.kernels.backend import implementation


def add_silu(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x`` [K, B, D] plus SiLU of ``y`` [S, K, B, n], whose last axis is D cut into S parts of n and padded; takes the
    place of ``x`` (Medusa paper, section 2.1.1; a part is a rank's)."""
    return implementation("add_silu", x.device).add_silu(x, y)
