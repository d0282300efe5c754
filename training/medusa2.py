"""Medusa-2: joint training of heads and backbone (Medusa paper, arXiv 2401.10774, section 2.2.2).

With self-distillation (section 2.3.2) the text is the backbone's own answers, and the teacher is the backbone without
adapters.
"""

import dataclasses
import shutil
import time
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError

from euryale.parallel import fsdp
from euryale.parallel.group import Group
from euryale.runtime.model.medusa_checkpoint import MERGED_PREFIX
from euryale.training import backbone as backbones
from euryale.training import heads, loop, medusa1
from euryale.training.loop import Training
from euryale.training.model import MedusaModel
from euryale.training.options import Medusa2Options
from euryale.training.packing import load_windows

_COPIED_FILES = (
    "tokenizer*",
    "added_tokens.json",
    "chat_template*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


def head_weight(step: int, args: Medusa2Options) -> float:
    """Return the weight of the heads' loss; it rises linearly, so that untrained heads do not harm the backbone."""
    return args.head_weight * min(1.0, (step + 1) / max(1, args.head_warmup_steps))


def save_merged(args: Medusa2Options, trained: dict[str, torch.Tensor]) -> None:
    """Write backbone and heads as one Hugging Face checkpoint, the third published layout, with copies of the tokenizer
    and the generation defaults."""
    out = Path(args.out)
    backbone_weights = {n.removeprefix("backbone."): t for n, t in trained.items() if n.startswith("backbone.")}
    adapter_to = out / "adapters" if args.save_adapters else None
    backbone = backbones.load_trained(args.model, backbone_weights, args.lora_rank, adapter_to)
    dtype = backbones.stored_dtype(args.model)
    state = {name: tensor.to(dtype) for name, tensor in backbone.state_dict().items()}
    if backbone.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    heads_weights = {n.removeprefix("heads."): t for n, t in trained.items() if n.startswith("heads.")}
    state |= {MERGED_PREFIX + name: tensor.to(dtype).clone() for name, tensor in heads_weights.items()}
    save_torch_state_dict(state, out, filename_pattern="model{suffix}.safetensors", metadata={"format": "pt"})
    backbone.config.dtype = dtype
    backbone.config.use_cache = True
    backbone.config.update(heads.describe(args.num_heads, args.num_layers))
    backbone.config.save_pretrained(out)
    for pattern in _COPIED_FILES:
        for file in Path(args.model).glob(pattern):
            shutil.copyfile(file, out / file.name)


def run(args: Medusa2Options, group: Group) -> dict:
    """Train and write the merged checkpoint to ``args.out``; returns the result of ``loop.report``. ValueError for bad
    input."""
    out, started = Path(args.out), time.monotonic()
    loop.store_options(args, out, group)
    if not args.heads:
        stage_one = args.stage_one()
        medusa1.run(stage_one, group)
        args = dataclasses.replace(args, heads=stage_one.out)
    torch.manual_seed(args.seed)
    backbone = backbones.load_backbone(args.model, torch.float32)
    config = backbone.config
    initial_heads = heads.make_heads(args, backbone.get_output_embeddings().weight.detach())
    windows, held_out = load_windows(args, config.vocab_size, config.max_position_embeddings)
    if args.gradient_checkpointing:
        backbone.train()  # transformers recomputes activations in training mode only
        backbone.gradient_checkpointing_enable()
    backbone = backbones.add_adapters(backbone, args.lora_rank) if args.lora_rank else backbone.requires_grad_(True)
    model = MedusaModel(backbone, initial_heads, args.labels, joint=True, distilled=args.self_distill)
    model.prepare(args, group)
    backbone_weights = torch.tensor([1.0, *[0.0] * args.num_heads])
    heads_weights = torch.tensor([0.0, *(args.head_decay**k for k in range(args.num_heads))])
    parts = ((args.lr, model.backbone), (args.lr * args.heads_lr_factor, model.heads))
    training = Training(
        options=args,
        group=group,
        model=model,
        optimizer=loop.make_optimizer(args, *parts),
        windows=windows,
        held_out=held_out,
        weights=lambda step: backbone_weights + head_weight(step, args) * heads_weights,
    )
    found = loop.train(training, out)
    state = fsdp.whole_state(model)
    with group.agreed(SafetensorError):
        if group.is_leader:
            save_merged(args, state)
    return loop.report(args, training, found, time.monotonic() - started)
