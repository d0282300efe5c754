"""Medusa heads (arXiv 2401.10774, section 2.1.1): guesses of the tokens after the next one.

Head k sees the hidden state of the last accepted row and guesses the token k + 1 places further than the backbone
does. All heads' residual blocks are one sharded matrix product; vocabularies are shared out as the backbone's
is. Legend: B requests, K heads, D hidden, V local vocabulary.
"""

import torch
import torch.nn.functional as F

from euryale.kernels.linear import FrozenLinear
from euryale.parallel import vocabulary
from euryale.parallel.layout import Layout
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.checkpoint import cut
from euryale.runtime.heads_format import HeadTensors


class MedusaHeads:
    """This rank's share of the heads. A residual block is x + SiLU(W x + b)."""

    def __init__(self, heads: HeadTensors, layout: Layout, lm_head: FrozenLinear, shard: VocabShard, dtype) -> None:
        """``lm_head`` [V, D], the backbone's, serves heads that have none of their own."""
        self.group, self.shard, self.num_heads = layout.group, shard, heads.num_heads
        self.hidden_size = lm_head.in_features

        def local(tensors: list[torch.Tensor], style: str) -> list[torch.Tensor]:
            parts = [cut(t, layout.shards(style, len(t), self.hidden_size)[0]) for t in tensors]
            return [p.to(layout.group.device, dtype) for p in parts]

        def block(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            """Weights [K, local D, D] and biases [K, local D] of one residual block of all heads."""
            weights, biases = local(heads.weights[layer], "column"), local(heads.biases[layer], "column")
            return torch.stack(weights), torch.stack(biases)

        # In the first block all heads see the same input, so that one matrix product does.
        self.first = None
        if heads.num_layers:
            weights, biases = block(0)
            self.first = FrozenLinear(weights.flatten(0, 1), biases.flatten())
        later = (block(layer) for layer in range(1, heads.num_layers))
        self.later = [[FrozenLinear(*of_head) for of_head in zip(*parts, strict=True)] for parts in later]
        self.lm_heads = [FrozenLinear(w) for w in local(heads.lm_heads, "vocabulary")] if heads.lm_heads else None
        self.lm_head = lm_head

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """Float32 logits over this rank's vocabulary shard: [B * K, V], a request's heads next to each other."""
        x_BKD = hidden_BD[:, None].expand(-1, self.num_heads, -1)
        if self.first is not None:
            x_BKD = x_BKD + F.silu(self._gather(self.first(hidden_BD).unflatten(1, (self.num_heads, -1))))
        for layer in self.later:
            local = torch.stack([linear(x_BKD[:, k]) for k, linear in enumerate(layer)], dim=1)
            x_BKD = x_BKD + F.silu(self._gather(local))
        if self.lm_heads is None:
            logits = self.lm_head(x_BKD.flatten(0, 1))
        else:
            logits = torch.stack([lm_head(x_BKD[:, k]) for k, lm_head in enumerate(self.lm_heads)], dim=1).flatten(0, 1)
        return self.shard.hide_padding(logits)

    def candidates(self, hidden_BD: torch.Tensor, k: int) -> torch.Tensor:
        """The ``k`` likeliest tokens of every head, likeliest first: int64 [B, K, k], the same on every rank."""
        _, ids = vocabulary.top_k(self.shard, self.logits(hidden_BD), k)
        return ids.view(len(hidden_BD), self.num_heads, -1)

    def _gather(self, local: torch.Tensor) -> torch.Tensor:
        """Every rank's [B, K, local D] as [B, K, D], without the padding."""
        return self.group.gather_last(local)[..., : self.hidden_size]
