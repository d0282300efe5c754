"""Matrix products with constant weights, which are packed once for batches of few rows."""

import torch

from euryale.kernels.backend import implementation
from euryale.kernels.linear.quantize import Weight


class FrozenLinear:
    """Computes y = x W^T + b for ``x`` [R, in]."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None = None) -> None:
        """``weight`` [out, in], quantized or not; ``bias`` [out] or None. ValueError for sizes that the kernels of a
        quantized weight do not support."""
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._module = implementation("linear", weight.device)
        self._weight = self._module.pack(weight)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Returns y [R, out] in the dtype of ``x``, written to ``out`` if given."""
        y: torch.Tensor = self._module.linear(x, self._weight, self.bias, self.out_features, out)
        return y


def linear_each(linears: list[FrozenLinear], x: torch.Tensor) -> torch.Tensor:
    """Applies ``linears[k]`` to ``x[k]`` for ``x`` [K, R, in]: [K, R, out]. All have the same shape."""
    y: torch.Tensor = implementation("linear", x.device).empty(x, len(linears), x.shape[1], linears[0].out_features)
    for linear, its_x, its_y in zip(linears, x, y, strict=True):
        linear(its_x, its_y)
    return y
