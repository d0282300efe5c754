"""Finds the largest values of every row and their ids.

Both are packed in one int32 tensor [2, R, k], which ranks send to each other: the bits of the float32 values, then the
ids. Values are in descending order, equal values in ascending order of their ids.
"""

import torch

from euryale.kernels.backend import implementation


def top_k(x: torch.Tensor, k: int, num_valid: int | None = None, offset: int = 0) -> torch.Tensor:
    """Finds the ``k`` largest of the first ``num_valid`` values (None: all) of each row of ``x`` [R, V].

    ``x`` is float32 or bfloat16 and has no NaN. Returns values and ids, a column plus ``offset``, packed: int32
    [2, R, k]. Missing entries are -inf with id 0. ValueError if ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    num_valid = x.shape[1] if num_valid is None else num_valid
    return implementation("top_k", x.device).top_k(x, k, num_valid, offset)


def merge_top_k(parts: torch.Tensor) -> torch.Tensor:
    """Merges the results of several ``top_k`` calls, int32 [S, 2, R, k], into the k largest: int32 [2, R, k]. Of equal
    values, those of the earlier part come first."""
    return parts[0] if len(parts) == 1 else implementation("top_k", parts.device).merge_top_k(parts)


def values_and_ids(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a packed int32 [2, R, k]: values float32 [R, k] and ids int32 [R, k]."""
    return packed[0].view(torch.float32), packed[1]


def pack(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Packs ``values`` float32 [R, k] and integer ``ids`` [R, k] into one int32 [2, R, k]."""
    return torch.stack([values.contiguous().view(torch.int32), ids.to(torch.int32)])
