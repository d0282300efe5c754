"""Medusa heads (arXiv 2401.10774, section 2.1.1), which predict the tokens after the next one.

Head k reads the hidden state of the last accepted row and predicts the token k + 1 places after the backbone's.
Residual blocks are sharded by output features, lm_heads like the backbone's. Legend: R rows, B requests, K heads, D
hidden, V local vocabulary.
"""

import torch

from euryale.kernels.add_silu import add_silu
from euryale.kernels.linear import FrozenLinear, linear_each
from euryale.kernels.take_rows import take_rows
from euryale.parallel import vocabulary
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.model.checkpoint import cut
from euryale.runtime.model.medusa_checkpoint import HeadTensors
from euryale.runtime.model.weights import Weights


class MedusaHeads:
    """The heads with this rank's shards of their weights. A residual block is x + SiLU(W x + b)."""

    def __init__(self, heads: HeadTensors, weights: Weights, lm_head: FrozenLinear, shard: VocabShard) -> None:
        """``weights``: the backbone's, for layout, dtype and quantization. ``lm_head`` [V, D]: the backbone's, for
        heads without their own."""
        self.group, self.shard, self.num_heads = weights.group, shard, heads.num_heads
        self.hidden_size = lm_head.in_features

        def local(tensors: list[torch.Tensor], style: str) -> list[torch.Tensor]:
            parts = [cut(t, weights.layout.shards(style, len(t), self.hidden_size)[0]) for t in tensors]
            return [p.to(self.group.device, weights.dtype) for p in parts]

        def linear(weight: torch.Tensor, bias: torch.Tensor) -> FrozenLinear:
            return FrozenLinear(weights.quantized(weight), bias)

        self.blocks = [
            [linear(*of_head) for of_head in zip(local(w, "column"), local(b, "column"), strict=True)]
            for w, b in zip(heads.weights, heads.biases, strict=True)
        ]
        lm_heads = local(heads.lm_heads, "vocabulary")
        self.lm_heads = [FrozenLinear(weights.quantized(w, is_lm_head=True)) for w in lm_heads] or None
        self.lm_head = lm_head

    def logits(self, hidden_RD: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Compute logits [K * B, V] after ``rows`` int32 [B], over this rank's vocabulary shard, padding included.

        The rows of a head are adjacent.
        """
        x_KBD = take_rows(hidden_RD, rows, repeat=self.num_heads).view(self.num_heads, len(rows), -1)
        for block in self.blocks:
            add_silu(x_KBD, self.group.all_gather(linear_each(block, x_KBD)))
        if self.lm_heads is None:
            return self.lm_head(x_KBD.flatten(0, 1))
        return linear_each(self.lm_heads, x_KBD).flatten(0, 1)

    def candidates(self, hidden_RD: torch.Tensor, rows: torch.Tensor, k: int) -> torch.Tensor:
        """Return the ``k`` likeliest tokens of every head after ``rows`` int32 [B]: int32 [2, K, B, k].

        Index 0 holds the bits of their float32 logits, index 1 the token ids, likeliest first. Equal on every rank.
        """
        return vocabulary.top_k(self.shard, self.logits(hidden_RD, rows), k).view(2, self.num_heads, len(rows), -1)
