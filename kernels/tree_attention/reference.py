"""Tree attention in plain PyTorch: gather the pages, mask, and let SDPA do the rest.

Segments of few rows and similar contexts are padded to one batch; a long prompt chunk goes alone, since padding
the others to its length would cost more than the extra call. Legend: b segments of a batch, T rows of its longest
segment, P pages of its longest context, L = P * page_size + T keys, K kv heads, G query heads per kv head.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from euryale.kernels.geometry import WORD, SegmentShape, StepGeometry, tree_tables

_SHORT = 128  # rows


@dataclass(frozen=True)
class _Batch:
    rows: torch.Tensor | None  # [b, T], padding repeats the segment's first row; None: all rows of the step, b = 1
    shape: tuple[int, int]  # b, T
    pages: torch.Tensor  # [b, P]
    mask: torch.Tensor  # [b, 1, T, L], 0 where seen and -inf elsewhere
    sources: torch.Tensor  # [n] places in [b * T] that hold real rows
    targets: torch.Tensor  # [n] the rows of the step they belong to


def tree_attention(
    q: torch.Tensor,
    scratch: torch.Tensor,
    cache: torch.Tensor,
    geometry: StepGeometry,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """See the package's public function."""
    k, v = scratch[:, : len(q)]
    key = ("tree_attention.reference", window, q.dtype, q.shape[1] // k.shape[1])
    if key not in geometry.prepared:
        geometry.prepared[key] = _prepare(geometry, window, q.dtype, q.shape[1] // k.shape[1], q.device)
    batches: list[_Batch] = geometry.prepared[key]
    if batches[0].rows is None:
        return _attend(q, k, v, cache, batches[0], scale).flatten(1)
    out = torch.empty_like(q)
    for batch in batches:
        out[batch.targets] = _attend(q, k, v, cache, batch, scale)[batch.sources]
    return out.flatten(1)


def _attend(q, k, v, cache, batch: _Batch, scale: float) -> torch.Tensor:
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


def _prepare(geometry: StepGeometry, window: int | None, dtype, groups: int, device) -> list[_Batch]:
    segments = geometry.segments
    batches = [[i] for i, s in enumerate(segments) if s.num_rows > _SHORT]
    short = [i for i, s in enumerate(segments) if s.num_rows <= _SHORT]
    for i in sorted(short, key=lambda i: -segments[i].context):
        last = batches[-1][0] if batches else None
        # At most half of a batch is padding: contexts within a factor of two of the batch's longest (its first).
        fits = last is not None and segments[last].num_rows <= _SHORT
        if fits and 2 * segments[i].context + _SHORT >= segments[last].context:
            batches[-1].append(i)
        else:
            batches.append([i])
    return [_batch(geometry, ids, window, dtype, groups, device) for ids in batches]


def _batch(geometry: StepGeometry, ids: list[int], window: int | None, dtype, groups: int, device) -> _Batch:
    segments = [geometry.segments[i] for i in ids]
    page = geometry.page_size
    t = max(s.num_rows for s in segments)
    p = max(-(-s.context // page) for s in segments)
    rows = np.zeros((len(ids), t), dtype=np.int64)
    pages = np.zeros((len(ids), p), dtype=np.int64)
    visible = np.zeros((len(ids), t, p * page + t), dtype=bool)
    visible[:, :, p * page] = True  # padding rows see something, or softmax would be undefined
    for i, segment in enumerate(segments):
        n, used = segment.num_rows, -(-segment.context // page)
        rows[i] = geometry.row_starts[ids[i]]
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
    targets = np.concatenate([geometry.row_starts[j] + np.arange(n) for j, n in zip(ids, counts, strict=True)])
    tensors = [torch.from_numpy(x).to(device) for x in (rows, pages, sources, targets)]
    is_whole = len(geometry.segments) == 1
    return _Batch(
        rows=None if is_whole else tensors[0],
        shape=(len(ids), t),
        pages=tensors[1],
        mask=mask.to(device),
        sources=tensors[2],
        targets=tensors[3],
    )


def _visible_rows(segment: SegmentShape) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of the segment each row sees, bool [n, n], and each row's place after the context, int [n]."""
    depths, bits = tree_tables(segment.parents.tobytes())
    certain, nodes = segment.num_new_tokens, np.arange(len(depths))
    visible = np.tril(np.ones((segment.num_rows, segment.num_rows), dtype=bool))
    in_tree = bits[:, nodes // WORD] >> (nodes % WORD).astype(np.uint64) & np.uint64(1)
    visible[certain - 1 :, certain - 1 :] = in_tree.astype(bool)
    return visible, np.concatenate([np.arange(certain), certain - 1 + depths[1:]])
