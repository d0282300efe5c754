"""Calls the compiled kernel (cpu.h beside this file)."""

import torch

from euryale.kernels import cpu


def rope_qk(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scratch: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """See the package's public function."""
    rows, width = qkv.shape
    _, _, kv_heads, head_dim = scratch.shape
    heads = width // head_dim - 2 * kv_heads
    cpu.library().rope_qk(
        cpu.DTYPES[qkv.dtype],
        rows,
        heads,
        kv_heads,
        head_dim,
        qkv.data_ptr(),
        positions.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        *cpu.halves(scratch),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        eps,
    )
    return qkv.view(rows, -1, head_dim)[:, :heads]
