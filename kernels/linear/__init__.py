"""Matrix products with weights that never change, laid out once for few rows at a time."""

import torch

from euryale.kernels.backend import implementation


class FrozenLinear:
    """y = x W^T + b for ``x`` [R, in]; ``weight`` [out, in], ``bias`` [out] or None."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._module = implementation("linear", weight.device)
        self._weight = self._module.pack(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[R, out]."""
        return self._module.linear(x, self._weight, self.bias, self.out_features)
