"""KV compaction: the accepted rows' K/V of all layers go from the step's scratch to the tail of the pages."""

import torch

from euryale.kernels.backend import implementation


def commit(cache: torch.Tensor, scratch: torch.Tensor, slots: torch.Tensor) -> None:
    """Copy scratch rows into the cache, in place and for all layers, K and V at once.

    ``cache`` [layers, 2, pages, kv_heads, page_size, head_dim]; ``scratch`` [layers, 2, rows >= R, kv_heads, head_dim];
    ``slots`` int64 [R], where each row goes: page * page_size + offset, distinct, or -1 if it goes nowhere. Source and
    destination are different tensors, so the order of the copies does not matter.
    """
    implementation("commit", cache.device).commit(cache, scratch, slots)
