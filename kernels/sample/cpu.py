"""Calls the compiled kernel (cpu.h beside this file)."""

import torch

from euryale.kernels import cpu
from euryale.kernels.threads import num_threads


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor, num_valid: int, offset: int
) -> torch.Tensor:
    """See the package's public function."""
    rows, width = logits.shape
    out = cpu.empty_ids(2, rows, 1)
    cpu.library().sample(
        cpu.DTYPES[logits.dtype],
        num_threads(),
        rows,
        width,
        num_valid,
        offset,
        logits.data_ptr(),
        temperature.data_ptr(),
        keys.data_ptr(),
        out[0].data_ptr(),
        out[1].data_ptr(),
    )
    return out
