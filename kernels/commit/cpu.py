"""Calls the compiled kernel once for all layers (cpu.cpp beside this file)."""

import torch

from euryale.kernels import cpu


def commit(cache: torch.Tensor, scratch: torch.Tensor, slots: torch.Tensor) -> None:
    """See the package's public function."""
    layers, _, pages, heads, page, dim = cache.shape
    cpu.library().commit(
        layers,
        pages,
        heads,
        page,
        scratch.shape[2],
        dim * cache.element_size(),
        cache.data_ptr(),
        scratch.data_ptr(),
        len(slots),
        slots.data_ptr(),
    )
