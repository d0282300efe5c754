"""The largest values of every row and where they are.

Both travel as one int32 tensor [2, R, k]: the float32 values as their bits, then the ids, largest first, of equal
values the smallest id first. That is what ranks send each other.
"""

import torch

from euryale.kernels.backend import implementation


def top_k(x: torch.Tensor, k: int, num_valid: int | None = None, offset: int = 0) -> torch.Tensor:
    """The ``k`` largest of the first ``num_valid`` (None: all) values of each row of ``x`` [R, V], and their columns
    plus ``offset``: int32 [2, R, k]. Where there are fewer than ``k``, the rest is -inf with id 0. NaNs are not allowed
    for, nor ``k`` below 1 (ValueError)."""
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    num_valid = x.shape[1] if num_valid is None else num_valid
    return implementation("top_k", x.device).top_k(x, k, num_valid, offset)


def merge_top_k(parts: torch.Tensor) -> torch.Tensor:
    """The k largest of what several ``top_k`` found, int32 [S, 2, R, k], of equal ones the earlier part's: int32
    [2, R, k]."""
    return parts[0] if len(parts) == 1 else implementation("top_k", parts.device).merge_top_k(parts)


def values_and_ids(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of an int32 [2, R, k]: float32 [R, k] and int32 [R, k]."""
    return packed[0].view(torch.float32), packed[1]


def pack(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """float32 [R, k] and ids [R, k] as one int32 [2, R, k]."""
    return torch.stack([values.contiguous().view(torch.int32), ids.to(torch.int32)])
