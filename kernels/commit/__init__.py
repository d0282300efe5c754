"""Copies accepted rows' keys and values from the step's scratch to the KV pages."""

import torch

from euryale.kernels.backend import implementation


def commit(cache: torch.Tensor, scratch: torch.Tensor, slots: torch.Tensor) -> None:
    """Copies scratch rows into the cache, in place, for keys and values of all layers.

    ``cache`` [layers, 2, pages, kv_heads, page_size, head_dim] and ``scratch`` [layers, 2, rows >= R, kv_heads,
    head_dim] have one dtype. ``slots`` int64 [R]: the destination page * page_size + offset of each row, or -1 to drop
    the row. Slots are distinct, and source and destination never overlap, so the order of the copies does not matter.
    """
    implementation("commit", cache.device).commit(cache, scratch, slots)
