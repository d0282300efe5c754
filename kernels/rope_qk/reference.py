"""Rotary embedding in plain PyTorch; element i of a head pairs with element i + head_dim / 2."""

import torch
import torch.nn.functional as F


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
    kv_heads, head_dim = scratch.shape[2:]
    rows = len(qkv)
    qkv = qkv.view(rows, -1, head_dim)
    q, k, v = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q = F.rms_norm(q, q.shape[-1:], q_norm, eps)
        k = F.rms_norm(k, k.shape[-1:], k_norm, eps)
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    scratch[0, :rows] = _rotate(k, cos, sin)
    scratch[1, :rows] = v
    return _rotate(q, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
