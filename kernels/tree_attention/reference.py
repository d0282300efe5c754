"""Tree attention in plain PyTorch: gathers the pages, builds masks, and calls SDPA.

Segments with few rows and similar contexts are padded to one batch. A long prompt chunk is a batch of its own, because
padding the others to its length would cost more than an extra call. Legend: b segments of a batch, T rows of its
longest segment, P pages of its longest context, L = P * page_size + T keys, K KV heads, G query heads per KV head.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from euryale.kernels.step_metadata import WORD, SegmentShape, StepMetadata, tree_tables

_SHORT = 128  # rows


@dataclass(frozen=True)
class _Batch:
    rows: torch.Tensor | None  # [b, T]; padding repeats the segment's first row; None: all rows of the step, b = 1
    shape: tuple[int, int]  # b, T
    pages: torch.Tensor  # [b, P]
    mask: torch.Tensor  # [b, 1, T * G, L], 0 where visible and -inf elsewhere
    sources: torch.Tensor  # [n], the entries of [b * T] that are not padding
    targets: torch.Tensor  # [n], the rows of the step that they belong to


def tree_attention(
    q: torch.Tensor,
    scratch: torch.Tensor,
    cache: torch.Tensor,
    metadata: StepMetadata,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """See the package's public function."""
    k, v = scratch[:, : len(q)]
    batches = metadata.once(_prepare, window, q.dtype, q.shape[1] // k.shape[1], q.device)
    if batches[0].rows is None:
        return _attend(q, k, v, cache, batches[0], scale).flatten(1)
    out = torch.empty_like(q)
    for batch in batches:
        out[batch.targets] = _attend(q, k, v, cache, batch, scale)[batch.sources]
    return out.flatten(1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, batch: _Batch, scale: float
) -> torch.Tensor:
    """Attention of one padded batch: [b * T, heads, head_dim]."""
    b, t = batch.shape
    num_kv, head_dim = k.shape[1:]
    groups = q.shape[1] // num_kv
    q, k, v = (x[None] if batch.rows is None else x[batch.rows] for x in (q, k, v))
    q_bKTGd = q.reshape(b, t, num_kv, groups, head_dim).transpose(1, 2)
    seen = cache[:, batch.pages].transpose(2, 3).reshape(2, b, num_kv, -1, head_dim)
    k_bKLd = torch.cat([seen[0], k.transpose(1, 2)], dim=2)
    v_bKLd = torch.cat([seen[1], v.transpose(1, 2)], dim=2)
    q_bKRd = q_bKTGd.reshape(b, num_kv, t * groups, head_dim)
    out = F.scaled_dot_product_attention(q_bKRd, k_bKLd, v_bKLd, attn_mask=batch.mask, scale=scale)
    return out.view(b, num_kv, t, groups, head_dim).transpose(1, 2).reshape(b * t, num_kv * groups, head_dim)


def _prepare(
    metadata: StepMetadata, window: int | None, dtype: torch.dtype, groups: int, device: torch.device
) -> list[_Batch]:
    segments = metadata.segments
    batches = [[i] for i, s in enumerate(segments) if s.num_rows > _SHORT]
    short = [i for i, s in enumerate(segments) if s.num_rows <= _SHORT]
    for i in sorted(short, key=lambda i: -segments[i].context):
        longest = segments[batches[-1][0]] if batches else None
        # At most half of a batch is padding: contexts are within a factor of two of the longest, which comes first.
        fits = longest is not None and longest.num_rows <= _SHORT
        if longest is not None and fits and 2 * segments[i].context + _SHORT >= longest.context:
            batches[-1].append(i)
        else:
            batches.append([i])
    return [_batch(metadata, ids, window, dtype, groups, device) for ids in batches]


def _batch(
    metadata: StepMetadata, ids: list[int], window: int | None, dtype: torch.dtype, groups: int, device: torch.device
) -> _Batch:
    segments = [metadata.segments[i] for i in ids]
    page = metadata.page_size
    t = max(s.num_rows for s in segments)
    p = max(-(-s.context // page) for s in segments)
    rows = np.zeros((len(ids), t), dtype=np.int64)
    pages = np.zeros((len(ids), p), dtype=np.int64)
    visible = np.zeros((len(ids), t, p * page + t), dtype=bool)
    visible[:, :, p * page] = True  # gives padding rows a visible key, or softmax would be undefined
    for i, segment in enumerate(segments):
        n, used = segment.num_rows, -(-segment.context // page)
        rows[i] = metadata.row_starts[ids[i]]
        rows[i, :n] += np.arange(n)
        pages[i, :used] = segment.pages[:used]
        among, places = _visible_rows(segment)
        visible[i, :n, : segment.context] = True
        visible[i, :n, p * page : p * page + n] = among
        if window is not None:
            positions = segment.context + places
            keys = np.concatenate([np.arange(p * page), positions])
            visible[i, :n, : p * page + n] &= positions[:, None] - keys[None, :] < window
    mask = torch.zeros(visible.shape, dtype=dtype)
    mask.masked_fill_(~torch.from_numpy(visible), -torch.inf)
    mask = mask.repeat_interleave(groups, dim=1)[:, None]
    counts = [s.num_rows for s in segments]
    sources = np.concatenate([i * t + np.arange(n) for i, n in enumerate(counts)])
    targets = np.concatenate([metadata.row_starts[j] + np.arange(n) for j, n in zip(ids, counts, strict=True)])
    tensors = [torch.from_numpy(x).to(device) for x in (rows, pages, sources, targets)]
    is_whole = len(metadata.segments) == 1
    return _Batch(
        rows=None if is_whole else tensors[0],
        shape=(len(ids), t),
        pages=tensors[1],
        mask=mask.to(device),
        sources=tensors[2],
        targets=tensors[3],
    )


def _visible_rows(segment: SegmentShape) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of the segment each row attends to, bool [n, n], and positions after the context, int [n]."""
    depths, bits = tree_tables(segment.parents.tobytes())
    num_new, nodes = segment.num_new_tokens, np.arange(len(depths))
    visible = np.tril(np.ones((segment.num_rows, segment.num_rows), dtype=bool))
    in_tree = bits[:, nodes // WORD] >> (nodes % WORD).astype(np.uint64) & np.uint64(1)
    visible[num_new - 1 :, num_new - 1 :] = in_tree.astype(bool)
    return visible, np.concatenate([np.arange(num_new), num_new - 1 + depths[1:]])
