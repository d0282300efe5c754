"""Matrix products with weights that never change, laid out once for few rows at a time."""

import torch

from euryale.kernels.backend import implementation
from euryale.kernels.linear.quantize import Weight


class FrozenLinear:
    """y = x W^T + b for ``x`` [R, in]; ``weight`` [out, in], quantized or not, ``bias`` [out] or None."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._module = implementation("linear", weight.device)
        self._weight = self._module.pack(weight)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[R, out], written to ``out`` if one is given."""
        return self._module.linear(x, self._weight, self.bias, self.out_features, out)


def linear_each(linears: list[FrozenLinear], x: torch.Tensor) -> torch.Tensor:
    """Each one's product with its own part of ``x`` [K, R, in]: [K, R, out]."""
    y = implementation("linear", x.device).empty(x, len(linears), x.shape[1], linears[0].out_features)
    for linear, its_x, its_y in zip(linears, x, y, strict=True):
        linear(its_x, its_y)
    return y
