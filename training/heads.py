"""Trainable Medusa heads and the published file layouts (Medusa paper, arXiv 2401.10774, section 2.1.1).

This module knows neither losses nor trees nor acceptance.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from euryale.runtime.model import checkpoint, medusa_checkpoint
from euryale.training.options import TrainOptions

WEIGHTS_NAME = "medusa_lm_head.safetensors"


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b); initialized to the identity."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block to ``x`` [..., D]."""
        return x + F.silu(self.linear(x))


class Heads(nn.ModuleList):
    """Head k predicts token t + 2 + k from the hidden state [..., D] of position t after the backbone's final norm.

    It returns logits [..., V] of its own lm_head. With ``vocab_size`` 0 it returns a hidden state [..., D] for the
    backbone's lm_head. Parameter names are those of the published files.
    """

    def __init__(self, num_heads: int, num_layers: int, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.num_layers, self.has_lm_heads = num_layers, vocab_size > 0
        for _ in range(num_heads):
            parts: list[nn.Module] = [ResidualBlock(hidden_size) for _ in range(num_layers)]
            if vocab_size:
                parts.append(nn.Linear(hidden_size, vocab_size, bias=False))
            self.append(nn.Sequential(*parts))

    def __iter__(self) -> Iterator[nn.Sequential]:
        """Iterate over the heads."""
        return cast("Iterator[nn.Sequential]", super().__iter__())

    @classmethod
    def like(cls, lm_head_VD: torch.Tensor, num_heads: int, num_layers: int, shared_lm_head: bool = False) -> "Heads":
        """Create heads in float32 that initially predict what the backbone with ``lm_head_VD`` [V, D] predicts."""
        vocab_size, hidden_size = lm_head_VD.shape
        heads = cls(num_heads, num_layers, hidden_size, 0 if shared_lm_head else vocab_size)
        if heads.has_lm_heads:
            with torch.no_grad():
                for head in heads:
                    _lm_head(head).copy_(lm_head_VD)
        return heads

    @classmethod
    def load(cls, directory: str, model: str, vocab_size: int, hidden_size: int) -> "Heads":
        """Load the heads in ``directory``, or those merged into ``model`` if it is empty, in float32.

        ValueError if there are none or their sizes do not match the backbone.
        """
        read = medusa_checkpoint.load_heads(directory, checkpoint.Checkpoint(model), hidden_size, vocab_size)
        if read is None:
            raise ValueError(f"{model} has no Medusa heads in it: name their directory with --heads")
        heads = cls(read.num_heads, read.num_layers, hidden_size, vocab_size if read.lm_heads else 0)
        with torch.no_grad():
            for h, head in enumerate(heads):
                for block, weights, biases in zip(head, read.weights, read.biases, strict=False):
                    assert isinstance(block, ResidualBlock)
                    block.linear.weight.copy_(weights[h])
                    block.linear.bias.copy_(biases[h])
                if read.lm_heads:
                    _lm_head(head).copy_(read.lm_heads[h])
        return heads


def _lm_head(head: nn.Sequential) -> torch.Tensor:
    """Return the lm_head's weight [V, D] of a head."""
    lm_head = head[-1]
    assert isinstance(lm_head, nn.Linear)
    return lm_head.weight


def describe(num_heads: int, num_layers: int) -> dict:
    """Return the configuration keys that all published layouts share."""
    return {"medusa_num_heads": num_heads, "medusa_num_layers": num_layers}


def save_heads(directory: Path, tensors: dict[str, torch.Tensor], model: str, dtype: torch.dtype) -> None:
    """Write ``config.json`` and the heads' ``tensors``, named as published, in ``dtype``.

    Tensors with lm_heads make the first published layout. Without lm_heads they make the second, in which heads use the
    backbone's lm_head. The weights file is replaced atomically and last.
    """
    directory.mkdir(parents=True, exist_ok=True)
    num_heads = 1 + max(int(name.split(".")[0]) for name in tensors)
    num_layers = sum(name.startswith("0.") and name.endswith("linear.bias") for name in tensors)
    config = describe(num_heads, num_layers) | {"base_model_name_or_path": os.path.relpath(model, directory)}
    if f"0.{num_layers}.weight" not in tensors:
        config["version"] = "2"
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    unfinished = directory / f"{WEIGHTS_NAME}.tmp"
    save_file({n: t.to(dtype).contiguous() for n, t in tensors.items()}, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)  # some writers restrict it to its owner
    unfinished.replace(directory / WEIGHTS_NAME)


def make_heads(args: TrainOptions, lm_head_VD: torch.Tensor) -> Heads:
    """Return new heads, or those of --heads. ValueError if these do not match the other options."""
    if not args.heads:
        return Heads.like(lm_head_VD.float(), args.num_heads, args.num_layers, args.shared_lm_head)
    heads = Heads.load(args.heads, args.model, *lm_head_VD.shape)
    if (len(heads), heads.num_layers) != (args.num_heads, args.num_layers):
        raise ValueError(
            f"{args.heads} holds {len(heads)} heads of {heads.num_layers} blocks: "
            f"give --num-heads {len(heads)} --num-layers {heads.num_layers}"
        )
    if args.shared_lm_head == heads.has_lm_heads:
        raise ValueError(
            f"the heads in {args.heads} have {'' if heads.has_lm_heads else 'no '}lm_heads of their own: "
            f"{'leave out' if heads.has_lm_heads else 'give'} --shared-lm-head"
        )
    return heads
