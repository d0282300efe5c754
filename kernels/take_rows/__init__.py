"""Gathers rows of a table: embeddings, and hidden states of selected rows."""

import torch

from euryale.kernels.backend import implementation


def take_rows(table: torch.Tensor, rows: torch.Tensor, offset: int = 0, repeat: int = 1) -> torch.Tensor:
    """Returns ``table[rows - offset]``, with zeros where the table has no such row, ``repeat`` times: [repeat * n, D].

    ``table`` [N, D] of any dtype, ``rows`` int32 [n].
    """
    return implementation("take_rows", table.device).take_rows(table, rows, offset, repeat)
