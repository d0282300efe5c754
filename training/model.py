"""Backbone and heads as one module: from windows of tokens to the losses of both.

Everything that touches a parameter happens inside ``forward``, as FSDP demands: outside it parameters are in pieces.
Shape suffixes: B windows, L positions, D hidden, K heads, R ranks.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from euryale.parallel import fsdp
from euryale.parallel.group import Group
from euryale.training import losses
from euryale.training.heads import Heads
from euryale.training.options import TrainOptions
from euryale.training.packing import Batch


class Sums(NamedTuple):
    """Over all positions of a batch: ``losses`` float32 [1 + K], nats, of the backbone and of every head; ``hits``
    int64 [K, R], targets by the head's rank (zeros in training)."""

    losses: torch.Tensor
    hits: torch.Tensor


class MedusaModel(nn.Module):
    """``labels`` "text": heads learn the text; "backbone": what the backbone would say (its argmax)."""

    def __init__(self, backbone: PreTrainedModel, heads: Heads, labels: str, joint: bool, distilled: bool) -> None:
        """``joint``: the backbone learns too; ``distilled``: not from the text but from itself without adapters."""
        super().__init__()
        self.backbone, self.heads = backbone, heads
        self.labels, self.joint, self.distilled = labels, joint, distilled
        self.vocab_size = backbone.config.vocab_size

    @property
    def inner(self) -> nn.Module:
        """The decoder without its lm_head, adapters included."""
        plain = self.backbone.get_base_model() if hasattr(self.backbone, "get_base_model") else self.backbone
        return plain.model

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder's layers and the heads: what FSDP shards one by one."""
        return [*self.inner.layers, *(head for head in self.heads if len(head))]

    def prepare(self, args: TrainOptions, group: Group) -> None:
        """Move to the device, shard or compile. Quantized weights cannot be sharded: such a backbone stays whole."""
        is_whole = getattr(args, "quantize", "none") != "none"
        blocks = [head for head in self.heads if len(head)] if is_whole else self.blocks
        whole = [self.backbone] if is_whole else []
        fsdp.shard_parameters(self, blocks, whole, args.precision == "bfloat16", group)
        if args.compile:
            self.compile(dynamic=False)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        return self.inner(batch.tokens, position_ids=batch.positions, use_cache=False).last_hidden_state

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """The backbone's logits; those of padding tokens beyond the vocabulary are left as they are."""
        lm_head = self.backbone.get_output_embeddings()
        return lm_head(x.to(lm_head.weight.dtype) if not torch.is_autocast_enabled(x.device.type) else x)

    def _head_logits(self, head: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return head(x) if self.heads.has_lm_heads else self._logits(head(x))

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Hidden states after the final norm, [B, L, D] in the backbone's dtype, without gradients."""
        with torch.no_grad():
            return self._hidden(batch)

    def forward(self, batch: Batch, hidden_BLD: torch.Tensor | None = None, task: str = "train"):
        """``task`` "train": Sums with gradients; "measure": Sums without, with hits, the backbone's loss against the
        text; "look": hidden states [B, L, D]. ``hidden_BLD`` spares a frozen backbone its work."""
        if task == "look":
            return self.hidden_states(batch)
        with contextlib.nullcontext() if task == "train" else torch.no_grad():
            return self._sums(batch, hidden_BLD, measured=task == "measure")

    def _teacher(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad(), self.backbone.disable_adapter():
            return self._hidden(batch)

    def _sums(self, batch: Batch, hidden_BLD: torch.Tensor | None, measured: bool) -> Sums:
        teacher_BLD = self._teacher(batch) if self.distilled and not measured else None
        if hidden_BLD is None:
            with contextlib.nullcontext() if self.joint else torch.no_grad():
                hidden_BLD = self._hidden(batch)
        text_BL = losses.next_tokens(batch)
        targets_BL = text_BL
        if self.labels == "backbone":
            seen_BLD = hidden_BLD if teacher_BLD is None else teacher_BLD
            targets_BL = losses.next_tokens(batch, losses.choices(self._logits, seen_BLD, self.vocab_size))
        found, hits = [self._backbone_loss(hidden_BLD, teacher_BLD, text_BL, measured)], []
        x_BLD = hidden_BLD.float()
        for k, head in enumerate(self.heads):
            wanted_BL = losses.head_targets(targets_BL, batch.documents, k)
            found.append(losses.cross_entropy(self._of(head), x_BLD, wanted_BL, self.vocab_size))
            if measured:
                hits.append(losses.hits(self._of(head), x_BLD, wanted_BL, self.vocab_size))
        none = torch.zeros(len(self.heads), losses.TOP_RANKS, dtype=torch.int64, device=x_BLD.device)
        return Sums(torch.stack(found), torch.stack(hits) if hits else none)

    def _of(self, head: nn.Module):
        return lambda x: self._head_logits(head, x)

    def _backbone_loss(self, hidden_BLD, teacher_BLD, text_BL, measured: bool) -> torch.Tensor:
        if not self.joint and not measured:
            return torch.zeros((), device=hidden_BLD.device)
        if teacher_BLD is not None:
            return losses.divergence(self._logits, hidden_BLD, teacher_BLD, text_BL, self.vocab_size)
        return losses.cross_entropy(self._logits, hidden_BLD, text_BL, self.vocab_size)
