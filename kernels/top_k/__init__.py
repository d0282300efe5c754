"""The largest values of every row and where they are."""

import torch

from euryale.kernels.backend import implementation


def top_k(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest of each row of ``x`` [R, V], largest first, of equal ones the first: float32 [R, k], int64
    [R, k]. Where ``k`` exceeds V, the rest is -inf. NaNs are not allowed for, nor ``k`` below 1 (ValueError)."""
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    return implementation("top_k", x.device).top_k(x, k)
