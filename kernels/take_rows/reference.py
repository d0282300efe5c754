"""Gathers rows in plain PyTorch."""

import torch


def take_rows(table: torch.Tensor, rows: torch.Tensor, offset: int, repeat: int) -> torch.Tensor:
    """See the package's public function."""
    local = rows - offset
    exists = (local >= 0) & (local < len(table))
    taken = table.index_select(0, local.clamp(0, len(table) - 1)).masked_fill_(~exists[:, None], 0)
    return taken.repeat(repeat, 1) if repeat > 1 else taken
