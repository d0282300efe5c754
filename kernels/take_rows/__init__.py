"""Rows of a table by their numbers: embeddings, and hidden states of chosen rows."""

import torch

from euryale.kernels.backend import implementation


def take_rows(table: torch.Tensor, rows: torch.Tensor, offset: int = 0, repeat: int = 1) -> torch.Tensor:
    """``table[rows - offset]``, zeros where the table has no such row, ``repeat`` times over: [repeat * n, D] from
    ``table`` [rows, D] and ``rows`` int32 [n]."""
    return implementation("take_rows", table.device).take_rows(table, rows, offset, repeat)
