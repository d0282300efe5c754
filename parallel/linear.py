"""Sharded layers. Each is built from the weights its rank holds; a group of one makes them ordinary layers."""

import torch
import torch.nn.functional as F
from torch import nn

from euryale.kernels.linear import FrozenLinear
from euryale.parallel.group import Group


def parameter(x: torch.Tensor) -> nn.Parameter:
    """A weight that is not trained here."""
    return nn.Parameter(x, requires_grad=False)


class ColumnParallelLinear(FrozenLinear):
    """Output features are shared out: [T, in] -> [T, local out]. Several weights become one matrix product."""

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> None:
        """``weights`` [local out_i, in], ``biases`` [local out_i] or all None."""
        bias = torch.cat(biases) if biases[0] is not None else None
        super().__init__(torch.cat(weights) if len(weights) > 1 else weights[0], bias)


class RowParallelLinear(nn.Module):
    """Input features are shared out and the ranks' partial sums added: [T, local in] -> [T, out] on every rank."""

    def __init__(self, group: Group, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """``weight`` [out, local in]; ``bias`` [out] whole, added once after the sum."""
        super().__init__()
        self.group = group
        self.partial = FrozenLinear(weight)
        self.bias = parameter(bias) if bias is not None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.group.all_reduce(self.partial(x))
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding are shared out: token ids [T] -> [T, D] on every rank."""

    def __init__(self, group: Group, weight: torch.Tensor) -> None:
        """``weight`` [ceil(V / size), D], padded with zeros."""
        super().__init__()
        self.group = group
        self.weight = parameter(weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.group.rank * len(self.weight)
        is_mine = (local >= 0) & (local < len(self.weight))
        rows = F.embedding(local.clamp(0, len(self.weight) - 1), self.weight)
        return self.group.all_reduce(torch.where(is_mine[:, None], rows, 0))
