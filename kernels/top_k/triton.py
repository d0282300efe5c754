"""The largest values in Triton: each program searches a block of columns, and a second kernel merges the blocks."""

import torch
import triton
import triton.language as tl

BLOCK = 2048


def top_k(x: torch.Tensor, k: int, num_valid: int, offset: int) -> torch.Tensor:
    """See the package's public function."""
    rows, blocks = len(x), max(1, triton.cdiv(num_valid, BLOCK))
    parts = torch.empty(blocks, 2, rows, k, dtype=torch.int32, device=x.device)
    _largest_of_blocks[(rows, blocks)](x, parts, num_valid, offset, x.stride(0), k, BLOCK=BLOCK)
    return parts[0] if blocks == 1 else merge_top_k(parts)


def merge_top_k(parts: torch.Tensor) -> torch.Tensor:
    """See the package's public function."""
    num_parts, _, rows, k = parts.shape
    out = torch.empty(2, rows, k, dtype=torch.int32, device=parts.device)
    _merge[(rows,)](parts, out, num_parts, k, BLOCK=triton.next_power_of_2(num_parts * k))
    return out


@triton.jit
def pick(x: tl.tensor, alive: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The largest of ``x`` where ``alive``, and its first index; -inf and the length if nothing is alive."""
    places = tl.arange(0, x.shape[0])
    value = tl.max(tl.where(alive, x, float("-inf")), axis=0)
    return value, tl.min(tl.where(alive & (x == value), places, x.shape[0]), axis=0)


@triton.jit
def _largest_of_blocks(
    x: tl.tensor,
    parts: tl.tensor,
    num_valid: tl.tensor,
    offset: tl.tensor,
    stride: tl.tensor,
    k: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    alive = columns < num_valid
    values = tl.load(x + row * stride + columns, mask=alive, other=float("-inf")).to(tl.float32)
    out = parts + (2 * block * tl.num_programs(0) + row) * k
    for i in range(k):
        value, place = pick(values, alive)
        found = tl.where(place < BLOCK, block * BLOCK + place + offset, 0)
        tl.store(out + i, value.to(tl.int32, bitcast=True))
        tl.store(out + tl.num_programs(0) * k + i, found.to(tl.int32))
        alive = alive & (tl.arange(0, BLOCK) != place)


@triton.jit
def _merge(parts: tl.tensor, out: tl.tensor, num_parts: tl.tensor, k: tl.tensor, BLOCK: tl.constexpr) -> None:
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    entry = tl.arange(0, BLOCK)
    alive = entry < num_parts * k
    at = (2 * (entry // k) * rows + row) * k + entry % k
    values = tl.load(parts + at, mask=alive, other=0).to(tl.float32, bitcast=True)
    ids = tl.load(parts + rows * k + at, mask=alive, other=0)
    for i in range(k):
        value, place = pick(values, alive)
        tl.store(out + row * k + i, value.to(tl.int32, bitcast=True))
        tl.store(out + (rows + row) * k + i, tl.sum(tl.where(entry == place, ids, 0), axis=0))
        alive = alive & (entry != place)
