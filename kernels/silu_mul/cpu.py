"""Calls the compiled kernel (cpu.h beside this file)."""

import torch

from euryale.kernels import cpu


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See the package's public function."""
    rows, width = gate_up.shape
    out = cpu.empty(gate_up, rows, width // 2)
    cpu.library().silu_mul(cpu.DTYPES[gate_up.dtype], rows, width // 2, gate_up.data_ptr(), out.data_ptr())
    return out
