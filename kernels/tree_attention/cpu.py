"""Tree attention by the compiled kernel (cpu.h beside this file)."""

import ctypes
from functools import lru_cache

import torch

from euryale.kernels import cpu
from euryale.kernels.geometry import StepGeometry


def tree_attention(q, scratch, cache, geometry: StepGeometry, scale: float, window: int | None) -> torch.Tensor:
    """See the package's public function."""
    rows, heads, head_dim = q.shape
    out = cpu.empty(q, rows, heads * head_dim)
    cpu.library().tree_attention(
        ctypes.pointer(cpu.step_of(geometry)),
        _shape(cpu.DTYPES[q.dtype], heads, scratch.shape[2], head_dim, q.stride(0), window or 0, scale),
        q.data_ptr(),
        *cpu.halves(scratch),
        *cpu.halves(cache),
        out.data_ptr(),
    )
    return out


@lru_cache(maxsize=64)
def _shape(*fields) -> ctypes.Structure:
    return ctypes.pointer(cpu.Attention(*fields))
