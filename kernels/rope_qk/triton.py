"""Rotary embedding in Triton: rotates queries in place, writes rotated keys and values to the step's scratch."""

import torch
import triton
import triton.language as tl

_HEADS = 8  # per program


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
    num_heads = width // head_dim
    heads = num_heads - 2 * kv_heads
    _turn[(rows, triton.cdiv(num_heads, _HEADS))](
        qkv,
        positions,
        cos,
        sin,
        *scratch.unbind(),
        q_norm,
        k_norm,
        eps,
        heads,
        kv_heads,
        HEAD_DIM=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        HEADS=_HEADS,
    )
    return qkv.view(rows, -1, head_dim)[:, :heads]


@triton.jit
def _normed(
    first: tl.tensor,
    second: tl.tensor,
    weight: tl.tensor,
    exists: tl.tensor,
    at: tl.tensor,
    eps: tl.tensor,
    HEAD_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """RMSNorm of heads, each as its two halves."""
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    scale = 1.0 / tl.sqrt(squares / HEAD_DIM + eps)
    low = tl.load(weight + at, mask=exists, other=0.0).to(tl.float32)
    high = tl.load(weight + HEAD_DIM // 2 + at, mask=exists, other=0.0).to(tl.float32)
    return first * scale[:, None] * low[None, :], second * scale[:, None] * high[None, :]


@triton.jit
def _turn(
    qkv: tl.tensor,
    positions: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    step_k: tl.tensor,
    step_v: tl.tensor,
    q_norm: tl.tensor | None,
    k_norm: tl.tensor,
    eps: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    half: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    exists = column < half
    is_query, is_value = head < heads, head >= heads + kv_heads
    from_head = qkv + (row * (heads + 2 * kv_heads) + head)[:, None] * HEAD_DIM + column[None, :]
    mask = (head < heads + 2 * kv_heads)[:, None] & exists[None, :]
    as_first = tl.load(from_head, mask=mask, other=0.0).to(tl.float32)
    as_second = tl.load(from_head + half, mask=mask, other=0.0).to(tl.float32)
    first, second = as_first, as_second
    if q_norm is not None:
        q_first, q_second = _normed(as_first, as_second, q_norm, exists, column, eps, HEAD_DIM)
        k_first, k_second = _normed(as_first, as_second, k_norm, exists, column, eps, HEAD_DIM)
        first = tl.where(is_query[:, None], q_first, k_first)
        second = tl.where(is_query[:, None], q_second, k_second)
    at = tl.load(positions + row) * half + column
    x = tl.load(cos + at, mask=exists, other=0.0).to(tl.float32)[None, :]
    y = tl.load(sin + at, mask=exists, other=0.0).to(tl.float32)[None, :]
    dtype = qkv.dtype.element_ty
    low = tl.where(is_value[:, None], as_first, first * x - second * y).to(dtype)
    high = tl.where(is_value[:, None], as_second, second * x + first * y).to(dtype)
    tl.store(from_head, low, mask=mask & is_query[:, None])
    tl.store(from_head + half, high, mask=mask & is_query[:, None])
    is_key = (head >= heads) & (head < heads + kv_heads)
    key = (row * kv_heads + head - heads)[:, None] * HEAD_DIM + column[None, :]
    tl.store(step_k + key, low, mask=mask & is_key[:, None])
    tl.store(step_k + key + half, high, mask=mask & is_key[:, None])
    value = key - kv_heads * HEAD_DIM
    tl.store(step_v + value, low, mask=mask & is_value[:, None])
    tl.store(step_v + value + half, high, mask=mask & is_value[:, None])
