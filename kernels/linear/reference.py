"""PyTorch's own matrix product."""

import torch
import torch.nn.functional as F

from euryale.kernels.linear import gpu
from euryale.kernels.linear.quantize import QuantizedWeight, Weight


def pack(weight: Weight) -> torch.Tensor:
    """``weight`` [out, in] as it is; a quantized one on a GPU as torchao's tensor, which brings its own product, and
    elsewhere as the numbers it stands for."""
    if not isinstance(weight, QuantizedWeight):
        return weight
    return gpu.tensor(weight) if weight.device.type == "cuda" else weight.dequantized()


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Room for products."""
    return like.new_empty(shape)


def linear(x, packed, bias, out_features: int, out: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b: [R, out_features]."""
    if out is not None and type(packed) is torch.Tensor and packed.dtype == x.dtype:
        return torch.mm(x, packed.T, out=out) if bias is None else torch.addmm(bias, x, packed.T, out=out)
    if packed.dtype == x.dtype:
        y = F.linear(x, packed, bias)
    else:
        y = F.linear(x.to(packed.dtype), packed, None if bias is None else bias.to(packed.dtype)).to(x.dtype)
    return y if out is None else out.copy_(y)
