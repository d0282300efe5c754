"""KV compaction in plain PyTorch: one indexed assignment."""

import torch


def commit(cache: torch.Tensor, scratch: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """See the package's public function."""
    page_size = cache.shape[4]
    # Indices apart from each other put the indexed axis first: [n, layers, 2, kv_heads, head_dim].
    pages = torch.div(slots, page_size, rounding_mode="floor")
    cache[:, :, pages, :, slots % page_size] = scratch[:, :, rows].permute(2, 0, 1, 3, 4)
