"""Gumbel-max sampling in Triton: the kernel computes the noise of noise.py beside this file itself."""

import torch
import triton
import triton.language as tl

from euryale.kernels.sample.noise import GOLDEN, MIX_1, MIX_2
from euryale.kernels.top_k.triton import BLOCK, merge_top_k, pick

_GOLDEN, _MIX_1, _MIX_2 = tl.constexpr(GOLDEN), tl.constexpr(MIX_1), tl.constexpr(MIX_2)


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor, num_valid: int, offset: int
) -> torch.Tensor:
    """See the package's public function."""
    rows, blocks = len(logits), max(1, triton.cdiv(num_valid, BLOCK))
    parts = torch.empty(blocks, 2, rows, 1, dtype=torch.int32, device=logits.device)
    _best_of_blocks[(rows, blocks)](logits, temperature, keys, parts, num_valid, offset, logits.stride(0), BLOCK=BLOCK)
    return parts[0] if blocks == 1 else merge_top_k(parts)


@triton.jit
def _gumbel(key: tl.tensor, ids: tl.tensor) -> tl.tensor:
    z = key + (ids + 1) * _GOLDEN  # int64 wraps, and its shifts are arithmetic
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MIX_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    bits = ((z ^ ((z >> 31) & 0x1FFFFFFFF)) >> 32) & 0xFFFFFFFF
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1 - 5.9604644775390625e-8)
    # -log1p(-u): the logarithm of 1 - u as rounded, corrected for the rounding.
    rest = 1.0 - u
    lost = rest - 1.0
    e = tl.where(lost == 0.0, u, tl.log(rest) * (u / tl.where(lost == 0.0, 1.0, lost)))
    return -tl.log(e)


@triton.jit
def _best_of_blocks(
    logits: tl.tensor,
    temperature: tl.tensor,
    keys: tl.tensor,
    parts: tl.tensor,
    num_valid: tl.tensor,
    offset: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row, block, rows = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    exists = columns < num_valid
    scores = tl.load(logits + row * stride + columns, mask=exists, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + row)
    if heat > 0:
        scores = scores / heat + _gumbel(tl.load(keys + row), (columns + offset).to(tl.int64))
    value, place = pick(scores, exists)
    out = parts + 2 * block * rows + row
    tl.store(out, value.to(tl.int32, bitcast=True))
    tl.store(out + rows, tl.where(place < BLOCK, block * BLOCK + place + offset, 0).to(tl.int32))
