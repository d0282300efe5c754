"""Calls the compiled kernel (cpu.h beside this file)."""

from functools import lru_cache
from typing import Any

import torch

from euryale.kernels import cpu
from euryale.kernels.step_metadata import StepMetadata


def tree_attention(
    q: torch.Tensor,
    scratch: torch.Tensor,
    cache: torch.Tensor,
    metadata: StepMetadata,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """See the package's public function."""
    rows, heads, head_dim = q.shape
    out = cpu.empty(q, rows, heads * head_dim)
    cpu.library().tree_attention(
        cpu.step_of(metadata),
        _attention(
            is_bfloat16=cpu.DTYPES[q.dtype],
            heads=heads,
            kv_heads=scratch.shape[2],
            head_dim=head_dim,
            q_stride=q.stride(0),
            window=window or 0,
            scale=scale,
        ),
        q.data_ptr(),
        *cpu.halves(scratch),
        *cpu.halves(cache),
        out.data_ptr(),
    )
    return out


@lru_cache(maxsize=64)
def _attention(**fields: float) -> Any:
    """A ctypes pointer to an ``Attention`` of operations.def."""
    return cpu.library().structure("Attention", fields)
