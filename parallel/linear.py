"""Sharded layers, built from a rank's shards of the weights. In a group of one they are ordinary layers."""

import torch

from euryale.kernels.linear import FrozenLinear
from euryale.kernels.linear.quantize import Weight, concatenated
from euryale.kernels.take_rows import take_rows
from euryale.parallel.group import Group


class ColumnParallelLinear(FrozenLinear):
    """Shards output features: [T, in] -> [T, local out]. Several weights become one matrix product."""

    def __init__(self, weights: list[Weight], biases: list[torch.Tensor | None]) -> None:
        """``weights`` [local out_i, in] of one kind, ``biases`` [local out_i] or all None."""
        present = [bias for bias in biases if bias is not None]
        assert len(present) in (0, len(biases)), "all weights have a bias, or none has"
        bias = torch.cat(present) if present else None
        super().__init__(concatenated(weights), bias)


class RowParallelLinear(FrozenLinear):
    """Shards input features: [T, local in] -> [T, out], this rank's partial sum. A ``ResidualNorm`` adds the ranks'."""

    def __init__(self, group: Group, weight: Weight, bias: torch.Tensor | None) -> None:
        """``weight`` [out, local in]. ``bias`` [out], not sharded, becomes part of the leader's partial sum."""
        super().__init__(weight, bias if group.is_leader else None)


class ResidualNorm:
    """Adds the ranks' partial sums to the residual stream and applies RMSNorm."""

    def __init__(self, group: Group, weight: torch.Tensor, eps: float) -> None:
        self.group, self.weight, self.eps = group, weight, eps

    def __call__(self, partial_sum: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Consumes ``partial_sum`` [T, D] and ``residual`` [T, D] (None: zeros). Returns the norm and the new residual,
        both [T, D] and the same on every rank."""
        return self.group.all_reduce_add_rms_norm(partial_sum, residual, self.weight, self.eps)


class VocabParallelEmbedding:
    """Shards rows of the embedding: token ids int32 [T] -> [T, D], zero where another rank holds the row."""

    def __init__(self, group: Group, weight: torch.Tensor) -> None:
        """``weight`` [ceil(V / size), D], padded with zeros."""
        self.group = group
        self.weight = weight

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rank's rows of ``tokens`` int32 [T]: [T, D], a partial sum of the embeddings."""
        return take_rows(self.weight, tokens, self.group.rank * len(self.weight))
