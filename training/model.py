"""Backbone and heads as one module that maps windows of tokens to losses.

FSDP keeps parameters sharded outside ``forward``, so that every use of a parameter is inside it. Shape suffixes:
B windows, L positions, D hidden, K heads, R ranks.
"""

import contextlib
from collections.abc import Callable
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


class LossSums(NamedTuple):
    """Sums over all positions of a batch.

    ``losses`` float32 [1 + K]: loss of the backbone and of every head, nats. ``rank_counts`` int64 [K, R]: targets by
    their rank at the head, zeros in training.
    """

    losses: torch.Tensor
    rank_counts: torch.Tensor


class BackboneWithHeads(nn.Module):
    """A backbone with its Medusa heads; subclasses define ``forward``."""

    def __init__(self, backbone: PreTrainedModel, heads: Heads) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, heads
        self.vocab_size: int = backbone.config.vocab_size

    @property
    def inner(self) -> nn.Module:
        """The decoder without its lm_head, adapters included."""
        plain = self.backbone.get_base_model() if hasattr(self.backbone, "get_base_model") else self.backbone
        return plain.model

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder's layers and the heads, which FSDP shards one by one."""
        layers = self.inner.layers
        assert isinstance(layers, nn.ModuleList)
        return [*layers, *(head for head in self.heads if len(head))]

    def _hidden(self, batch: Batch) -> torch.Tensor:
        return self.inner(batch.tokens, position_ids=batch.positions, use_cache=False).last_hidden_state

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return the backbone's logits [..., V], including those of padding tokens beyond the vocabulary."""
        lm_head = self.backbone.get_output_embeddings()
        return lm_head(x.to(lm_head.weight.dtype) if not torch.is_autocast_enabled(x.device.type) else x)

    def _head_logits(self, head: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return head(x) if self.heads.has_lm_heads else self._logits(head(x))

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Return the hidden states after the final norm, [B, L, D] in the backbone's dtype, without gradients."""
        with torch.no_grad():
            return self._hidden(batch)


class MedusaModel(BackboneWithHeads):
    """The module that is trained: ``forward`` returns the losses of backbone and heads."""

    def __init__(self, backbone: PreTrainedModel, heads: Heads, labels: str, joint: bool, distilled: bool) -> None:
        """``labels``: "text" trains the heads on the text, "backbone" on the backbone's argmax.

        ``joint``: the backbone is trained too. ``distilled``: its target is its own distribution without adapters
        instead of the text.
        """
        super().__init__(backbone, heads)
        self.labels, self.joint, self.distilled = labels, joint, distilled

    def prepare(self, args: TrainOptions, group: Group) -> None:
        """Move the module to the device, and shard or compile it.

        A quantized backbone is replicated, because quantized weights cannot be sharded.
        """
        is_replicated = getattr(args, "quantization", "none") != "none"
        blocks: list[nn.Module] = [head for head in self.heads if len(head)] if is_replicated else self.blocks
        replicated = [self.backbone] if is_replicated else []
        fsdp.shard_parameters(self, blocks, replicated, args.precision == "bfloat16", group)
        if args.compile:
            self.compile(dynamic=False)

    def forward(
        self, batch: Batch, hidden_BLD: torch.Tensor | None = None, task: str = "train"
    ) -> LossSums | torch.Tensor:
        """Return LossSums, or hidden states [B, L, D].

        ``task``: "train" returns sums with gradients. "measure" returns sums without gradients, with rank counts and
        the backbone's loss on the text. "hidden states" returns these alone. ``hidden_BLD``: stored hidden states of a
        frozen backbone, which is not run then.
        """
        if task == "hidden states":
            return self.hidden_states(batch)
        with contextlib.nullcontext() if task == "train" else torch.no_grad():
            return self._sums(batch, hidden_BLD, is_measuring=task == "measure")

    def _teacher(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad(), self.backbone.disable_adapter():
            return self._hidden(batch)

    def _sums(self, batch: Batch, hidden_BLD: torch.Tensor | None, is_measuring: bool) -> LossSums:
        teacher_BLD = self._teacher(batch) if self.distilled and not is_measuring else None
        if hidden_BLD is None:
            with contextlib.nullcontext() if self.joint else torch.no_grad():
                hidden_BLD = self._hidden(batch)
        text_BL = losses.next_tokens(batch)
        targets_BL = text_BL
        if self.labels == "backbone":
            labels_BLD = hidden_BLD if teacher_BLD is None else teacher_BLD
            targets_BL = losses.next_tokens(batch, losses.argmax_tokens(self._logits, labels_BLD, self.vocab_size))
        sums = [self._backbone_loss(hidden_BLD, teacher_BLD, text_BL, is_measuring)]
        rank_counts: list[torch.Tensor] = []
        x_BLD = hidden_BLD.float()
        for k, head in enumerate(self.heads):
            head_BL = losses.head_targets(targets_BL, batch.documents, k)
            sums.append(losses.cross_entropy(self._logits_of(head), x_BLD, head_BL, self.vocab_size))
            if is_measuring:
                rank_counts.append(losses.count_ranks(self._logits_of(head), x_BLD, head_BL, self.vocab_size))
        zeros = torch.zeros(len(self.heads), losses.TOP_RANKS, dtype=torch.int64, device=x_BLD.device)
        return LossSums(torch.stack(sums), torch.stack(rank_counts) if rank_counts else zeros)

    def _logits_of(self, head: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: self._head_logits(head, x)

    def _backbone_loss(
        self, hidden_BLD: torch.Tensor, teacher_BLD: torch.Tensor | None, text_BL: torch.Tensor, is_measuring: bool
    ) -> torch.Tensor:
        if not self.joint and not is_measuring:
            return torch.zeros((), device=hidden_BLD.device)
        if teacher_BLD is not None:
            return losses.divergence(self._logits, hidden_BLD, teacher_BLD, text_BL, self.vocab_size)
        return losses.cross_entropy(self._logits, hidden_BLD, text_BL, self.vocab_size)
