"""Calls the compiled kernel (cpu.h beside this file)."""

import torch

from euryale.kernels import cpu


def add_silu(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """See the package's public function."""
    parts, num_heads, batch, part = y.shape
    cpu.library().add_silu(cpu.DTYPES[x.dtype], parts, num_heads * batch, part, x.shape[-1], y.data_ptr(), x.data_ptr())
    return x
