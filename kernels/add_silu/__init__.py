"""Adds the residual block of Medusa heads: x + SiLU(y)."""

import torch

from euryale.kernels.backend import implementation


def add_silu(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Adds SiLU(``y``) to ``x`` [K, B, D] in place and returns ``x`` (Medusa paper, section 2.1.1).

    ``y`` [S, K, B, n] holds D in S parts of n columns, one per rank; columns beyond D are padding. Both are float32 or
    both are bfloat16.
    """
    return implementation("add_silu", x.device).add_silu(x, y)
