"""The largest values by the compiled kernel (cpu.h beside this file)."""

import torch

from euryale.kernels import cpu


def top_k(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's public function."""
    x = x.contiguous()
    rows, width = x.shape
    values, ids = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    cpu.library().top_k(cpu.DTYPES[x.dtype], rows, width, k, x.data_ptr(), values.data_ptr(), ids.data_ptr())
    return values, ids
