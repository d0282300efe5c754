"""The copy in Triton: one launch for all rows, heads and layers, keys and values."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def commit(cache: torch.Tensor, scratch: torch.Tensor, slots: torch.Tensor) -> None:
    """See the package's public function."""
    layers, _, num_pages, heads, page_size, head_dim = cache.shape
    grid = (len(slots), 2 * layers, triton.cdiv(heads * head_dim, _BLOCK))
    _copy_rows[grid](
        cache,
        scratch,
        slots,
        num_pages,
        scratch.shape[2],
        heads,
        PAGE=page_size,
        HEAD_DIM=head_dim,
        BLOCK=_BLOCK,
    )


@triton.jit
def _copy_rows(
    cache: tl.tensor,
    scratch: tl.tensor,
    slots: tl.tensor,
    num_pages: tl.tensor,
    num_rows: tl.tensor,
    heads: tl.tensor,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    half = tl.program_id(1).to(tl.int64)  # layer by layer, K then V
    element = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    exists = element < heads * HEAD_DIM
    head, column = element // HEAD_DIM, element % HEAD_DIM
    value = tl.load(scratch + (half * num_rows + row) * heads * HEAD_DIM + element, mask=exists, other=0.0)
    of_page = (half * num_pages + slot // PAGE) * heads
    tl.store(cache + ((of_page + head) * PAGE + slot % PAGE) * HEAD_DIM + column, value, mask=exists)
