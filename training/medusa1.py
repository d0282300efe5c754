"""Medusa-1: training of heads on a frozen backbone (Medusa paper, arXiv 2401.10774, section 2.2.1)."""

import dataclasses
import time
from pathlib import Path

import torch
from safetensors import SafetensorError

from euryale.parallel import fsdp
from euryale.parallel.group import Group
from euryale.training import backbone as backbones
from euryale.training import loop
from euryale.training.heads import make_heads, save_heads
from euryale.training.hidden_states import StoredHiddenStates
from euryale.training.loop import Training
from euryale.training.model import MedusaModel
from euryale.training.options import Medusa1Options
from euryale.training.packing import load_windows


def run(args: Medusa1Options, group: Group) -> dict:
    """Train the heads and write them to ``args.out``; returns the report of ``loop.report``.

    ValueError for bad input.
    """
    out, started = Path(args.out), time.monotonic()
    loop.store_options(args, out, group)
    torch.manual_seed(args.seed)
    backbone = backbones.load_backbone(args.model, None)
    config = backbone.config
    heads = make_heads(args, backbone.get_output_embeddings().weight.detach())
    windows, held_out = load_windows(args, config.vocab_size, config.max_position_embeddings)
    if args.quantization != "none":
        backbones.quantize(backbone, args.quantization, group.device)
    model = MedusaModel(backbone, heads, args.labels, joint=False, distilled=False)
    model.prepare(args, group)
    weights = torch.tensor([0.0, *(args.head_decay**k for k in range(args.num_heads))])
    training = Training(
        options=args,
        group=group,
        model=model,
        optimizer=loop.make_optimizer(args, (args.lr, model.heads)),
        windows=windows,
        held_out=held_out,
        weights=lambda _step: weights,
    )
    if args.cache_hidden_states:
        stored = StoredHiddenStates(training, out / "hidden_states.bin", config.hidden_size, group)
        training = dataclasses.replace(training, hidden=stored)
    found = loop.train(training, out)
    state = fsdp.whole_state(model.heads)
    with group.agreed(SafetensorError):
        if group.is_leader:
            save_heads(out, state, args.model, backbones.stored_dtype(args.model))
    return loop.report(args, training, found, time.monotonic() - started)
