"""Medusa heads (arXiv 2401.10774, section 2.1.1): guesses of the tokens after the next one.

Head k sees the hidden state of the last accepted row and guesses the token k + 1 places further than the backbone
does. All heads' residual blocks are one sharded matrix product; vocabularies are shared out as the backbone's
is. Legend: B requests, K heads, D hidden, V local vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from euryale.parallel import vocabulary
from euryale.parallel.layout import Layout
from euryale.parallel.linear import parameter
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.checkpoint import cut
from euryale.runtime.heads_format import HeadTensors


class MedusaHeads(nn.Module):
    """This rank's share of the heads. A residual block is x + SiLU(W x + b)."""

    def __init__(self, heads: HeadTensors, layout: Layout, shared_lm_head: torch.Tensor, shard: VocabShard, dtype) -> None:
        """``shared_lm_head`` [V, D] serves heads that have none of their own."""
        super().__init__()
        self.group, self.shard, self.num_heads = layout.group, shard, heads.num_heads
        self.hidden_size = shared_lm_head.shape[1]

        def local(tensors: list[torch.Tensor], style: str) -> list[torch.Tensor]:
            parts = [cut(t, layout.shards(style, len(t), self.hidden_size)[0]) for t in tensors]
            return [p.to(layout.group.device, dtype) for p in parts]

        blocks = range(heads.num_layers)
        # [K, local D, D] and [K, local D] of each residual block
        self.weights = nn.ParameterList(parameter(torch.stack(local(heads.weights[i], "column"))) for i in blocks)
        self.biases = nn.ParameterList(parameter(torch.stack(local(heads.biases[i], "column"))) for i in blocks)
        own = local(heads.lm_heads, "vocabulary") if heads.lm_heads else []
        self.lm_heads = nn.ParameterList(parameter(w) for w in own)
        self.shared_lm_head = shared_lm_head

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """Float32 logits over this rank's vocabulary shard: [B * K, V], a request's heads next to each other."""
        x_BKD = hidden_BD[:, None].expand(-1, self.num_heads, -1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x_BKD = x_BKD + F.silu(self._block(x_BKD, weight, bias))
        if self.lm_heads:
            logits = torch.stack([F.linear(x_BKD[:, k], w) for k, w in enumerate(self.lm_heads)], dim=1)
        else:
            logits = F.linear(x_BKD, self.shared_lm_head)
        return self.shard.hide_padding(logits.flatten(0, 1))

    def candidates(self, hidden_BD: torch.Tensor, k: int) -> torch.Tensor:
        """The ``k`` likeliest tokens of every head, likeliest first: int64 [B, K, k], the same on every rank."""
        _, ids = vocabulary.top_k(self.shard, self.logits(hidden_BD), k)
        return ids.view(len(hidden_BD), self.num_heads, -1)

    def _block(self, x_BKD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """W x + b of every head, gathered: [B, K, D]."""
        if x_BKD.stride(1) == 0:  # the first block: all heads see the same input, so one product does
            local = F.linear(x_BKD[:, 0], weight.flatten(0, 1)).view(len(x_BKD), self.num_heads, -1)
        else:
            local = torch.einsum("bkd,kod->bko", x_BKD, weight)
        return self.group.gather_last(local + bias)[..., : self.hidden_size]
