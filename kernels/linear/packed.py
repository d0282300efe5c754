"""oneDNN's prepacked matrix product, the operator that PyTorch's own CPU freezing uses."""

import torch

_ROWS = 8  # what the layout is chosen for: a tree of a few nodes


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN is there and packs this dtype on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` [out, in] in oneDNN's layout; opaque."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


def linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b for ``x`` [..., in]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
