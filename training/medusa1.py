"""Medusa-1: heads on a frozen backbone (Medusa paper, arXiv 2401.10774, section 2.2.1)."""

import json
import logging
import time
from pathlib import Path

import torch

from euryale.parallel import fsdp
from euryale.parallel.group import Group
from euryale.runtime.tokenizer import load_tokenizer
from euryale.training import backbone as backbones
from euryale.training import loop, options
from euryale.training.corpus import is_held_out
from euryale.training.data import read_pieces, tokenize
from euryale.training.heads import Heads, save_heads
from euryale.training.hidden_states import StoredHiddenStates
from euryale.training.loop import Training
from euryale.training.model import MedusaModel
from euryale.training.options import DataOptions, Medusa1Options, TrainOptions
from euryale.training.packing import Windows, pack

logger = logging.getLogger("euryale.training")


def load_documents(args: DataOptions, vocab_size: int):
    """Documents to train on and documents held out, with the tokenizer; ValueError if either are none."""
    tokenizer = load_tokenizer(args.model, vocab_size)
    pieces = list(read_pieces(args.data, tokenizer))
    if args.held_out:
        trained, held = pieces, list(read_pieces(args.held_out, tokenizer))
    else:
        sides = [is_held_out(piece.key, args.held_out_percent) for piece in pieces]
        trained = [p for p, side in zip(pieces, sides, strict=True) if not side]
        held = [p for p, side in zip(pieces, sides, strict=True) if side]
    for name, found in (("to train on", trained), ("held out", held)):
        if not found:
            raise ValueError(
                f"of {len(pieces)} documents none is {name}: give more --data, --held-out FILE or another "
                "--held-out-percent"
            )
    return tokenize(trained, tokenizer, vocab_size), tokenize(held, tokenizer, vocab_size), tokenizer


def load_windows(args: TrainOptions, vocab_size: int, max_positions: int) -> tuple[Windows, Windows]:
    """Windows to train on and to measure on."""
    if args.length > max_positions:
        raise ValueError(f"--length {args.length} is more than the {max_positions} tokens the model was made for")
    trained, held, tokenizer = load_documents(args, vocab_size)
    padding = tokenizer.eos_token_id or 0
    windows, held_out = pack(trained, args.length, padding), pack(held, args.length, padding)
    logger.info(
        "%d documents in %d windows of %d (%.2f M learned tokens), %d windows held out",
        len(trained), len(windows), args.length, windows.num_learned / 1e6, len(held_out),
    )  # fmt: skip
    return windows, held_out


def make_heads(args: TrainOptions, lm_head_VD: torch.Tensor) -> Heads:
    """Fresh heads, or those of --heads."""
    if not args.heads:
        return Heads.like(lm_head_VD.float(), args.num_heads, args.num_layers, args.shared_lm_head)
    heads = Heads.load(args.heads, args.model, *lm_head_VD.shape)
    if (len(heads), heads.num_layers) != (args.num_heads, args.num_layers):
        raise ValueError(
            f"{args.heads} holds {len(heads)} heads of {heads.num_layers} blocks: "
            f"say --num-heads {len(heads)} --num-layers {heads.num_layers}"
        )
    return heads


def prepare(model: MedusaModel, args: TrainOptions, group: Group, is_whole: bool) -> MedusaModel:
    """Move to the device, shard or compile; ``is_whole`` keeps the backbone in one piece on every rank."""
    model.to(group.device)
    if args.gradient_checkpointing:
        model.backbone.train()  # transformers checkpoints in training mode only
        model.backbone.gradient_checkpointing_enable()
    blocks = [head for head in model.heads if len(head)] if is_whole else model.blocks
    fsdp.shard_parameters(model, blocks, [model.backbone] if is_whole else [], group)
    if args.compile and group.size == 1:
        model.compile(dynamic=False)
    return model


def report(args: TrainOptions, training: Training, found: dict, seconds: float) -> dict:
    """Write and return the numbers of ``report.json``."""
    rounded = {"steps": found["steps"], "tokens": found["tokens"], "world_size": training.group.size}
    rounded |= {"seconds": round(seconds, 1), "backbone_bytes": backbones.size_in_bytes(training.model.backbone)}
    rounded |= {name: found[name] for name in ("backbone_loss", "head_losses", "top", "first")}
    if training.group.is_leader:
        Path(args.out, "report.json").write_text(json.dumps(rounded, indent=1) + "\n")
    return rounded


def run(args: Medusa1Options, group: Group) -> dict:
    """Train, and write the heads to ``args.out``; returns what ``report`` does. ValueError for bad input."""
    out, started = Path(args.out), time.monotonic()
    loop.remember(args, out, group, options.changed)
    torch.manual_seed(args.seed)
    frozen = backbones.load_backbone(args.model, None, group.device)
    lm_head = frozen.get_output_embeddings().weight.detach().clone()
    heads = make_heads(args, lm_head)
    windows, held_out = load_windows(args, frozen.config.vocab_size, frozen.config.max_position_embeddings)
    if args.quantize != "none":
        backbones.quantize(frozen, args.quantize)
    model = MedusaModel(frozen, heads, args.labels, joint=False, distilled=False)
    prepare(model, args, group, is_whole=args.quantize != "none")
    trained = [p for p in model.heads.parameters() if p.requires_grad]
    groups = [{"params": trained, "lr": args.lr, "base_lr": args.lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    weights = torch.tensor([0.0, *(args.head_decay**k for k in range(args.num_heads))])
    setup = {"options": args, "group": group, "model": model, "optimizer": optimizer, "windows": windows}
    training = Training(**setup, held_out=held_out, weights=lambda _step: weights)
    if args.cache_hidden_states:
        stored = StoredHiddenStates(training, out / "hidden_states.bin", lm_head.shape[1], group)
        training = Training(**setup, held_out=held_out, weights=lambda _step: weights, hidden=stored)
    found = loop.train(training, out)
    state = fsdp.whole_state(model.heads)
    if group.is_leader:
        save_heads(out, state, args.model, backbones.stored_dtype(args.model))
    return report(args, training, found, time.monotonic() - started)
