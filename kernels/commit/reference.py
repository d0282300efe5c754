"""The copy in plain PyTorch: one indexed assignment."""

import torch


def commit(cache: torch.Tensor, scratch: torch.Tensor, slots: torch.Tensor) -> None:
    """See the package's public function."""
    page_size, (rows,) = cache.shape[4], (slots >= 0).nonzero(as_tuple=True)
    slots = slots[rows]
    # Indices that are not adjacent put the indexed axis first: [n, layers, 2, kv_heads, head_dim].
    pages = torch.div(slots, page_size, rounding_mode="floor")
    cache[:, :, pages, :, slots % page_size] = scratch[:, :, rows].permute(2, 0, 1, 3, 4)
