"""Tree attention in Triton: online softmax over blocks of keys, committed pages first, then the step's own rows.

One kernel handles decoding, chains, trees and prompt chunks; work_list.py beside this file splits a step into items. A
program computes one item for one KV head and reads each key once for all query rows of its block. A second kernel
merges partial results in the order of the splits.
"""

import torch
import triton
import triton.language as tl

from euryale.kernels.step_metadata import WORD, StepMetadata
from euryale.kernels.tree_attention.work_list import FIELDS, MERGE_FIELDS, work_list

_WORD = tl.constexpr(WORD)
_NEVER = tl.constexpr(-3e38)  # score of a masked key
_FIELDS, _MERGE_FIELDS = tl.constexpr(FIELDS), tl.constexpr(MERGE_FIELDS)
_MERGE_ROWS = 4  # query rows per program of the merge kernel


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
    kv_heads, dim = scratch.shape[2], max(16, triton.next_power_of_2(head_dim))
    group = heads // kv_heads
    out = q.new_empty(rows, heads * head_dim)
    shape = {"GROUP": group, "HEAD_DIM": head_dim, "DIM": dim}
    for work in work_list(metadata, group, dim, q.dtype == torch.float32, window, q.device):
        tile = work.tile
        sums = q.new_empty(work.num_partials, kv_heads, tile.rows, dim, dtype=torch.float32)
        peaks = q.new_empty(work.num_partials, kv_heads, tile.rows, 2, dtype=torch.float32)
        _attend[(len(work.items), kv_heads)](
            q,
            *cache.unbind(),
            *scratch.unbind(),
            metadata.pages,
            metadata.positions,
            metadata.ancestors,
            work.items,
            work.counts,
            out,
            sums,
            peaks,
            scale * 1.4426950408889634,  # log2(e): the kernels use powers of two
            q.stride(0),
            **shape,
            PAGE=metadata.page_size,
            ROWS=tile.rows,
            KEYS=tile.keys,
            SPLIT=tile.split,
            WINDOW=window or 0,
            UPCAST=q.device.type == "cpu",  # Triton's interpreter cannot compute in bfloat16
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if work.num_partials:
            grid = (len(work.merges), kv_heads, tile.rows // _MERGE_ROWS)
            _merge_splits[grid](
                sums, peaks, work.merges, work.counts, out, **shape, ROWS=tile.rows, PART=_MERGE_ROWS, num_warps=1
            )
    return out


@triton.jit
def _load_heads(
    base: tl.tensor,
    offsets: tl.tensor,
    exists: tl.tensor,
    dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
) -> tl.tensor:
    """Loads [n, DIM] from ``base`` + ``offsets`` int64 [n]; zeros beyond HEAD_DIM and where not ``exists``."""
    columns = tl.arange(0, DIM)
    mask = exists[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(base + offsets[:, None] + columns[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def _store_heads(
    base: tl.tensor, offsets: tl.tensor, exists: tl.tensor, x: tl.tensor, HEAD_DIM: tl.constexpr, DIM: tl.constexpr
) -> None:
    columns = tl.arange(0, DIM)
    mask = exists[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(base + offsets[:, None] + columns[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _absorb(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    seen: tl.tensor,
    scale: tl.tensor,
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Adds one block of keys to the running weighted values, maximum and sum."""
    scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, _NEVER)
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # As long as a row has no visible key, the maximum is _NEVER and the power is 1.
    weights = tl.where(seen, tl.exp2(scores - new_top[:, None]), 0.0)
    decay = tl.exp2(top - new_top)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_top, total * decay + tl.sum(weights, axis=1)


@triton.jit
def _over_context(
    q: tl.tensor,
    cache_k: tl.tensor,
    cache_v: tl.tensor,
    pages: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    position: tl.tensor,
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Phase 1, committed keys ``begin`` to ``end``; ``cache_k``, ``cache_v`` begin at this kv head."""
    ROWS: tl.constexpr = q.shape[0]
    DIM: tl.constexpr = q.shape[1]
    top, total = tl.full((ROWS,), _NEVER, tl.float32), tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    page_stride = tl.num_programs(1).to(tl.int64) * PAGE * HEAD_DIM
    for at in range(begin, end, KEYS):
        keys = at + tl.arange(0, KEYS)
        exists = keys < end
        page = tl.load(pages + keys // PAGE, mask=exists, other=0).to(tl.int64)
        offsets = page * page_stride + keys % PAGE * HEAD_DIM
        k = _load_heads(cache_k, offsets, exists, q.dtype, HEAD_DIM, DIM)
        v = _load_heads(cache_v, offsets, exists, q.dtype, HEAD_DIM, DIM)
        seen = exists[None, :]
        if WINDOW > 0:
            seen = seen & (position[:, None] - keys[None, :] < WINDOW)
        acc, top, total = _absorb(q, k, v, seen, scale, acc, top, total)
    return acc, top, total


@triton.jit
def _over_step(
    q: tl.tensor,
    step_k: tl.tensor,
    step_v: tl.tensor,
    positions: tl.tensor,
    ancestors: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    row: tl.tensor,
    num_new: tl.tensor,
    scale: tl.tensor,
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Phase 2, the segment's rows ``begin`` to ``end``; all tensors begin at its first row, keys at this kv head."""
    DIM: tl.constexpr = q.shape[1]
    row_stride = tl.num_programs(1).to(tl.int64) * HEAD_DIM
    low, high = tl.load(ancestors + row * 2)[:, None], tl.load(ancestors + row * 2 + 1)[:, None]
    for at in range(begin, end, KEYS):
        column = at + tl.arange(0, KEYS)
        inside = column < end
        k = _load_heads(step_k, column * row_stride, inside, q.dtype, HEAD_DIM, DIM)
        v = _load_heads(step_v, column * row_stride, inside, q.dtype, HEAD_DIM, DIM)
        node = (column - num_new + 1)[None, :]  # 1 and up for drafts
        bits = tl.where(node < _WORD, low, high) >> (node & (_WORD - 1)).to(tl.int64)
        in_chain = (node < 1) & (column[None, :] <= row[:, None])
        in_tree = (node >= 1) & (row >= num_new)[:, None] & ((bits & 1) != 0)
        seen = inside[None, :] & (in_chain | in_tree)
        if WINDOW > 0:
            distance = tl.load(positions + row)[:, None] - tl.load(positions + column, mask=inside, other=0)[None, :]
            seen = seen & (distance < WINDOW)
        acc, top, total = _absorb(q, k, v, seen, scale, acc, top, total)
    return acc, top, total


@triton.jit
def _attend(
    q: tl.tensor,
    cache_k: tl.tensor,
    cache_v: tl.tensor,
    step_k: tl.tensor,
    step_v: tl.tensor,
    pages: tl.tensor,
    positions: tl.tensor,
    ancestors: tl.tensor,
    items: tl.tensor,
    counts: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    peaks: tl.tensor,
    scale: tl.tensor,
    q_stride: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    if tl.program_id(0) >= tl.load(counts):  # room for other steps
        return
    kv_head, kv_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    item = items + tl.program_id(0) * _FIELDS
    start, count, num_new = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
    context, first_page, first = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    split, partial = tl.load(item + 6), tl.load(item + 7).to(tl.int64)
    query = first + tl.arange(0, ROWS)
    exists, head = query < count * GROUP, kv_head * GROUP + query % GROUP
    row = tl.minimum(query // GROUP, count - 1)  # query rows beyond the last repeat it
    positions, ancestors, pages = positions + start, ancestors + start * 2, pages + first_page
    dtype: tl.constexpr = tl.float32 if UPCAST else q.dtype.element_ty
    q = _load_heads(q, (start + row) * q_stride + head * HEAD_DIM, exists, dtype, HEAD_DIM, DIM)
    begin, end = split * SPLIT, context + (tl.minimum(first + ROWS, count * GROUP) - 1) // GROUP + 1
    if WINDOW > 0:
        begin = tl.maximum(begin, context + tl.minimum(first // GROUP, num_new) - WINDOW + 1)
    end = tl.minimum(end, (split + 1) * SPLIT)

    k, v = cache_k + kv_head * PAGE * HEAD_DIM, cache_v + kv_head * PAGE * HEAD_DIM
    last, position = tl.minimum(end, context), tl.load(positions + row)
    acc, top, total = _over_context(q, k, v, pages, begin, last, position, scale, HEAD_DIM, PAGE, KEYS, WINDOW)
    begin, end, of_step = tl.maximum(begin - context, 0), end - context, (start * kv_heads + kv_head) * HEAD_DIM
    k, v = step_k + of_step, step_v + of_step
    acc, top, total = _over_step(
        q, k, v, positions, ancestors, begin, end, row, num_new, scale, acc, top, total, HEAD_DIM, KEYS, WINDOW
    )
    if partial < 0:
        straight = ((start + row) * kv_heads * GROUP + head) * HEAD_DIM
        _store_heads(out, straight, exists, acc / total[:, None], HEAD_DIM, DIM)
    else:
        at = (partial * kv_heads + kv_head) * ROWS + tl.arange(0, ROWS)
        tl.store(sums + at[:, None] * DIM + tl.arange(0, DIM)[None, :], acc)
        tl.store(peaks + at * 2, top)
        tl.store(peaks + at * 2 + 1, total)


@triton.jit
def _merge_splits(
    sums: tl.tensor,
    peaks: tl.tensor,
    merges: tl.tensor,
    counts: tl.tensor,
    out: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """PART query rows of a block: their splits, one after the other."""
    if tl.program_id(0) >= tl.load(counts + 1):
        return
    kv_head, kv_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    merge = merges + tl.program_id(0) * _MERGE_FIELDS
    start, first, count = tl.load(merge).to(tl.int64), tl.load(merge + 1), tl.load(merge + 2)
    partial, num_splits = tl.load(merge + 3).to(tl.int64), tl.load(merge + 4)
    within = tl.program_id(2) * PART + tl.arange(0, PART)
    top, total = tl.full((PART,), _NEVER, tl.float32), tl.zeros((PART,), tl.float32)
    acc = tl.zeros((PART, DIM), tl.float32)
    for split in range(num_splits):
        at = ((partial + split) * kv_heads + kv_head) * ROWS + within
        peak = tl.load(peaks + at * 2)
        new_top = tl.maximum(top, peak)
        decay, weight = tl.exp2(top - new_top), tl.exp2(peak - new_top)
        part = tl.load(sums + at[:, None] * DIM + tl.arange(0, DIM)[None, :])
        acc = acc * decay[:, None] + part * weight[:, None]
        total = total * decay + tl.load(peaks + at * 2 + 1) * weight
        top = new_top
    query = first + within
    at = ((start + query // GROUP) * kv_heads * GROUP + kv_head * GROUP + query % GROUP) * HEAD_DIM
    _store_heads(out, at, query < count, acc / total[:, None], HEAD_DIM, DIM)
