"""Sharded layers. Each is built from the weights its rank holds; a group of one makes them ordinary layers."""

import torch

from euryale.kernels.linear import FrozenLinear
from euryale.kernels.linear.quantize import Weight, concatenated
from euryale.kernels.take_rows import take_rows
from euryale.parallel.group import Group


class ColumnParallelLinear(FrozenLinear):
    """Output features are shared out: [T, in] -> [T, local out]. Several weights become one matrix product."""

    def __init__(self, weights: list[Weight], biases: list[torch.Tensor | None]) -> None:
        """``weights`` [local out_i, in], ``biases`` [local out_i] or all None."""
        bias = torch.cat(biases) if biases[0] is not None else None
        super().__init__(concatenated(weights), bias)


class RowParallelLinear(FrozenLinear):
    """Input features are shared out: [T, local in] -> [T, out], this rank's share of a sum over the ranks, which the
    ``ResidualNorm`` that follows takes."""

    def __init__(self, group: Group, weight: Weight, bias: torch.Tensor | None) -> None:
        """``weight`` [out, local in]; ``bias`` [out] whole, part of the leader's share."""
        super().__init__(weight, bias if group.is_leader else None)


class ResidualNorm:
    """RMSNorm of the residual stream after adding to it what the ranks hold shares of."""

    def __init__(self, group: Group, weight: torch.Tensor, eps: float) -> None:
        self.group, self.weight, self.eps = group, weight, eps

    def __call__(self, share: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """``share`` and ``residual`` [T, D], both consumed: the norm and the new residual, the same on every rank."""
        return self.group.all_reduce_add_rms_norm(share, residual, self.weight, self.eps)


class VocabParallelEmbedding:
    """Rows of the embedding are shared out: token ids int32 [T] -> [T, D], zero where another rank has the row."""

    def __init__(self, group: Group, weight: torch.Tensor) -> None:
        """``weight`` [ceil(V / size), D], padded with zeros."""
        self.group = group
        self.weight = weight

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return take_rows(self.weight, tokens, self.group.rank * len(self.weight))
