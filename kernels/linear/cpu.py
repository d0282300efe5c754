"""The compiled matrix product (cpu.h beside this file), whose weights lie in the order in which they are read."""

import torch

from euryale.kernels import cpu
from euryale.kernels.cpu import empty  # noqa: F401


def pack(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` [out, in] in the kernel's order; opaque, and only for the instruction set in use."""
    library, kind = cpu.library(), cpu.DTYPES[weight.dtype]
    out_features, in_features = weight.shape
    packed = weight.new_empty(library.linear_size(kind, in_features, out_features))
    source = weight.contiguous()
    library.linear_pack(kind, in_features, out_features, source.data_ptr(), packed.data_ptr())
    return packed


def linear(x, packed, bias, out_features: int, out: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b: [R, out_features]."""
    x = x.contiguous()
    rows, in_features = x.shape
    y = cpu.empty(x, rows, out_features) if out is None else out
    cpu.library().linear_run(
        cpu.DTYPES[x.dtype],
        torch.get_num_threads(),
        rows,
        in_features,
        out_features,
        x.data_ptr(),
        packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
    )
    return y
