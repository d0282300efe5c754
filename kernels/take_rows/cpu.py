"""Calls the compiled kernel (cpu.cpp beside this file)."""

import torch

from euryale.kernels import cpu


def take_rows(table: torch.Tensor, rows: torch.Tensor, offset: int, repeat: int) -> torch.Tensor:
    """See the package's public function."""
    out = cpu.empty(table, repeat * len(rows), table.shape[1])
    size = table.shape[1] * table.element_size()
    cpu.library().take_rows(
        len(rows), repeat, size, len(table), offset, table.data_ptr(), rows.data_ptr(), out.data_ptr()
    )
    return out
