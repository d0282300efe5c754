"""Train the demo backbone: a small Llama from scratch on the standard library's source.

``python -m euryale.training.pretrain --out DIR`` writes a Hugging Face directory (bfloat16). A killed run goes
on where its last checkpoint was written when the same command is given again.
"""

import argparse
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from euryale.training import corpus

CHECKPOINT_STEPS = 100
OPENING = 128  # tokens of a beginning


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """The command's flags. ``tokens`` counts repetitions too; ``batch`` windows of ``length`` tokens per step. The last
    ``polish_steps`` come on top: every other one shows beginnings, ``corpus.openings``, as prompts are."""

    out: Path
    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    tokens: float = 10e6
    batch: int = 8
    length: int = 1024
    polish_steps: int = 160
    lr: float = 6e-3
    seed: int = 0
    compile: bool = True

    @property
    def main_steps(self) -> int:
        return math.ceil(self.tokens / (self.batch * self.length))

    @property
    def steps(self) -> int:
        return self.main_steps + self.polish_steps


def options_from_flags(options_class, description: str):
    """An instance of the dataclass from the command line: every field is a flag, without a default required."""
    parser = argparse.ArgumentParser(description=description)
    for field in dataclasses.fields(options_class):
        required = field.default is dataclasses.MISSING
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        default = {} if required else {"default": field.default}
        parser.add_argument("--" + field.name.replace("_", "-"), required=required, **default, **kind)
    return options_class(**vars(parser.parse_args()))


def demo_config(vocab_size: int, hidden_size: int = 256, num_layers: int = 6) -> LlamaConfig:
    """About 5.8 M parameters with the defaults; sizes that a group of 1, 2, 4 or 8 ranks can share."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden_size // 8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def lm_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy (nats) of int64 tokens [batch, length]."""
    hidden = model.model(tokens).last_hidden_state[:, :-1]
    logits = F.linear(hidden, model.lm_head.weight).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def held_out_loss(model: LlamaForCausalLM, stream: np.ndarray, length: int = 1024, limit: int = 64) -> float:
    """Mean loss over consecutive held-out windows, in nats per token."""
    count = min(limit, (len(stream) - 1) // length)
    losses = []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for i in range(count):
            window = torch.from_numpy(stream[i * length : (i + 1) * length].astype(np.int64))[None]
            losses.append(lm_loss(model, window).item())
    return sum(losses) / count


def make_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embedding and norms."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(hidden, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=lr / 2, betas=(0.9, 0.95), weight_decay=0.0)]


def schedule(step: int, steps: int, warmup: int = 40, decay: float = 0.4) -> float:
    """Learning-rate factor: warm-up, constant, then linear to zero over the last ``decay`` of the steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps))


def learning_rate(step: int, args: PretrainOptions) -> float:
    """Learning-rate factor of a step; the polish begins again at a third and falls to zero."""
    if step < args.main_steps:
        return schedule(step, args.main_steps)
    return 0.35 * (args.steps - step) / args.polish_steps


def training_batch(step: int, args: PretrainOptions, stream: np.ndarray, beginnings: np.ndarray) -> torch.Tensor:
    """The tokens of a step: int64 [batch, length], or the same number of tokens in shorter beginnings."""
    if step < args.main_steps or step % 2 == 0 or not len(beginnings):
        return torch.from_numpy(corpus.windows(stream, args.length, args.batch, step, args.seed))
    count = max(1, args.batch * args.length // OPENING)
    rows = np.arange(count) + (step - args.main_steps) // 2 * count
    return torch.from_numpy(beginnings[rows % len(beginnings)])


def save_checkpoint(path: Path, model, optimizers, step: int) -> None:
    """Write weights, optimizer states and the step; the rename makes it whole or absent."""
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load_checkpoint(path: Path, model, optimizers) -> int:
    """Restore what ``save_checkpoint`` wrote, if it did; the step to go on with."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def train(args: PretrainOptions, model, train_stream, beginnings, held_stream, work: Path) -> None:
    """Run the training loop in place, resuming from ``work/state.pt`` if it is there."""
    optimizers = make_optimizers(model, args.lr)
    base_lrs = [o.param_groups[0]["lr"] for o in optimizers]
    checkpoint, steps = work / "state.pt", args.steps
    first = load_checkpoint(checkpoint, model, optimizers)
    compiled = torch.compile(lm_loss, dynamic=False) if args.compile else lm_loss
    started = time.monotonic()
    for step in range(first, steps):
        tokens = training_batch(step, args, train_stream, beginnings)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, base in zip(optimizers, base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = base * learning_rate(step, args)
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            rate = (step - first + 1) * tokens.numel() / (time.monotonic() - started)
            print(f"step {step}/{steps} loss {loss.item():.3f} {rate:.0f} tokens/s", flush=True)
        if (step + 1) % CHECKPOINT_STEPS == 0 or step == steps - 1:
            save_checkpoint(checkpoint, model, optimizers, step + 1)
            print(f"step {step + 1} held-out loss {held_out_loss(model, held_stream, limit=16):.3f}", flush=True)


def run(args: PretrainOptions) -> dict:
    """Tokenizer, training and the written checkpoint; returns the numbers of ``work/pretrain.json``."""
    torch.manual_seed(args.seed)
    work = args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    config = demo_config(args.vocab_size, args.hidden_size, args.num_layers)
    train_files, _ = corpus.split(corpus.standard_library_files())
    if not (args.out / "tokenizer.json").exists():
        corpus.train_tokenizer(train_files, args.vocab_size, config.max_position_embeddings).save_pretrained(args.out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    train_stream, held_stream = corpus.streams(tokenizer)
    print(f"{len(train_stream)} training tokens, {len(held_stream)} held out", flush=True)
    model = LlamaForCausalLM(config)
    count = args.polish_steps // 2 * args.batch * args.length // OPENING
    beginnings = corpus.openings(tokenizer, train_files, OPENING, max(1, count), args.seed)
    train(args, model, train_stream, beginnings, held_stream, work)
    report = {"held_out_loss": held_out_loss(model, held_stream), "train_tokens": len(train_stream)}
    report |= {"held_out_tokens": len(held_stream), "parameters": sum(p.numel() for p in model.parameters())}
    model.to(torch.bfloat16).save_pretrained(args.out)
    (work / "pretrain.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    run(options_from_flags(PretrainOptions, __doc__))
