"""Uses PyTorch's matrix product."""

import torch
import torch.nn.functional as F

from euryale.kernels.linear import gpu
from euryale.kernels.linear.quantize import QuantizedWeight, Weight


def pack(weight: Weight) -> torch.Tensor:
    """Returns ``weight`` [out, in] unchanged. A quantized weight becomes a torchao tensor on GPUs, which brings its own
    product, and is dequantized elsewhere."""
    if not isinstance(weight, QuantizedWeight):
        return weight
    return gpu.tensor(weight) if weight.device.type == "cuda" else weight.dequantized()


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """An uninitialised output with the dtype and device of ``like``."""
    return like.new_empty(shape)


def linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int, out: torch.Tensor | None
) -> torch.Tensor:
    """Returns x W^T + b [R, out_features]."""
    if out is not None and type(packed) is torch.Tensor and packed.dtype == x.dtype:
        return torch.mm(x, packed.T, out=out) if bias is None else torch.addmm(bias, x, packed.T, out=out)
    if packed.dtype == x.dtype:
        y = F.linear(x, packed, bias)
    else:
        y = F.linear(x.to(packed.dtype), packed, None if bias is None else bias.to(packed.dtype)).to(x.dtype)
    return y if out is None else out.copy_(y)
