"""Calls the compiled kernels (cpu.h beside this file)."""

import torch

from euryale.kernels import cpu
from euryale.kernels.threads import num_threads


def top_k(x: torch.Tensor, k: int, num_valid: int, offset: int) -> torch.Tensor:
    """See the package's public function."""
    x = x.contiguous()
    rows, width = x.shape
    out = cpu.empty_ids(2, rows, k)
    cpu.library().top_k(
        cpu.DTYPES[x.dtype],
        num_threads(),
        rows,
        width,
        num_valid,
        k,
        offset,
        x.data_ptr(),
        out[0].data_ptr(),
        out[1].data_ptr(),
    )
    return out


def merge_top_k(parts: torch.Tensor) -> torch.Tensor:
    """See the package's public function."""
    num_parts, _, rows, k = parts.shape
    out = cpu.empty_ids(2, rows, k)
    cpu.library().merge_top_k(num_parts, rows, k, parts.data_ptr(), out.data_ptr())
    return out
