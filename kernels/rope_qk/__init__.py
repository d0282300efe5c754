"""Applies rotary position embedding to queries and keys, with an optional RMSNorm per head before it."""

import torch

from euryale.kernels.backend import implementation


def rope_qk(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scratch: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Rotates queries and keys by each row's position and writes keys and values to the step's scratch.

    ``qkv`` [R, (heads + 2 kv_heads) * head_dim]: queries, keys and values, consumed. ``positions`` int64 [R]: context
    plus depth in the tree, not the row's index. ``cos``, ``sin`` [positions, head_dim / 2], in the dtype of ``qkv``.
    ``scratch`` [2, rows >= R, kv_heads, head_dim]: this layer's keys and values of the step. ``q_norm``, ``k_norm``
    [head_dim]: RMSNorm weights with ``eps`` (Qwen3), or None. Returns the queries [R, heads, head_dim].
    """
    return implementation("rope_qk", qkv.device).rope_qk(qkv, positions, cos, sin, scratch, q_norm, k_norm, eps)
