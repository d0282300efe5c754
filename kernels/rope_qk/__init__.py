"""Rotary position embedding of queries and keys, with the optional q/k norm before it."""

import torch

from euryale.kernels.rope_qk import reference


def rope_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate ``q`` [R, heads, head_dim] and ``k`` [R, kv_heads, head_dim] by each row's position.

    ``cos``, ``sin`` [R, head_dim / 2] of the rows' positions (context + depth, not the row's index), in the dtype
    of ``q``; ``q_norm``, ``k_norm`` [head_dim], RMSNorm weights applied per head first (Qwen3).
    """
    return reference.rope_qk(q, k, cos, sin, q_norm, k_norm, eps)
