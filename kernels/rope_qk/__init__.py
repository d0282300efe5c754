"""Rotary position embedding of queries and keys, with the optional q/k norm before it."""

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
    """Turn queries and keys by each row's position; keys and values go to the step's scratch.

    ``qkv`` [R, (heads + 2 kv_heads) * head_dim], queries, keys, values: consumed. ``positions`` int64 [R] (context +
    depth, not the row's index); ``cos``, ``sin`` [positions, head_dim / 2] in the dtype of ``qkv``; ``scratch`` [2,
    rows >= R, kv_heads, head_dim] of this layer, keys and values; ``q_norm``, ``k_norm`` [head_dim], RMSNorm weights
    applied per head first (Qwen3). Returns the queries [R, heads, head_dim].
    """
    return implementation("rope_qk", qkv.device).rope_qk(qkv, positions, cos, sin, scratch, q_norm, k_norm, eps)
