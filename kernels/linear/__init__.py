"""Matrix products with weights that never change, laid out once for few rows at a time."""

import torch
import torch.nn.functional as F
from torch import nn

from euryale.kernels.linear import packed


class FrozenLinear(nn.Module):
    """y = x W^T + b for ``x`` [R, in]; ``weight`` [out, in], ``bias`` [out] or None. On a CPU the weight is stored
    in oneDNN's own layout, which for 1 to 32 rows is up to 3 times faster than the plain one, though not for the
    smallest float32 matrices (docs/experiments.md)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.is_packed = packed.can_pack(weight)
        self.weight = packed.pack(weight) if self.is_packed else nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_packed:
            return packed.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)
