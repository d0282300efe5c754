"""Training of the demo backbone: a small Llama from scratch on the standard library's source.

The output is a Hugging Face directory in bfloat16. An interrupted run continues from its last checkpoint when the
command is repeated.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from euryale.client.rules import Rule, is_whole, number, whole
from euryale.parallel import fsdp
from euryale.parallel.group import Group
from euryale.scheduler.flag import check_flags, flag
from euryale.training import corpus
from euryale.training.options import COUNT, COUNT_OR_NONE, EXECUTION, RATE, TRAINING

OUTPUT, SHAPE = "result", "model"
# Eight heads whose dimension is even.
WIDTH = Rule("a multiple of 16 from 16 to 65536", lambda v: is_whole(v) and v in range(16, (1 << 16) + 1, 16))
CHECKPOINT_STEPS = 100
OPENING_LENGTH = 128  # tokens of a prompt-like excerpt


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """A small Llama, trained from scratch on the Python standard library's source."""

    out: str = flag("", "directory of the model that is written", OUTPUT, required=True)
    vocab_size: int = flag(4096, "tokens of the byte-level BPE vocabulary", SHAPE, whole(257, 1 << 20, "tokens"))
    hidden_size: int = flag(256, "width of the model", SHAPE, WIDTH)
    num_layers: int = flag(6, "decoder layers", SHAPE, whole(1, 1 << 10, "layers"))
    tokens: float = flag(10e6, "tokens to train on, with repetitions", TRAINING, number(1, 1e15, "tokens"))
    batch: int = flag(8, "windows per step", TRAINING, COUNT)
    length: int = flag(1024, "tokens per window", TRAINING, whole(2, 1 << 20, "tokens"))
    polish_steps: int = flag(
        160, "final steps in which every second batch holds prompt-like text", TRAINING, COUNT_OR_NONE
    )
    lr: float = flag(6e-3, "learning rate", TRAINING, RATE)
    seed: int = flag(0, "random seed", EXECUTION, whole(0, 2**63 - 1))
    compile: bool = flag(True, "compile the model", EXECUTION)

    def __post_init__(self) -> None:
        check_flags(self)

    @property
    def main_steps(self) -> int:
        """Steps on running text alone."""
        return math.ceil(self.tokens / (self.batch * self.length))

    @property
    def steps(self) -> int:
        """All steps, those on prompt-like text included."""
        return self.main_steps + self.polish_steps


def demo_config(vocab_size: int, hidden_size: int = 256, num_layers: int = 6) -> LlamaConfig:
    """Return the configuration, about 5.8 M parameters with the defaults; its sizes can be sharded over 1, 2, 4 or 8
    ranks."""
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
    """Return the mean next-token cross-entropy, nats, of int64 tokens [batch, length]."""
    hidden = model.model(tokens).last_hidden_state[:, :-1]
    logits = F.linear(hidden, model.lm_head.weight).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def held_out_loss(model: LlamaForCausalLM, stream: np.ndarray, length: int = 1024, limit: int = 64) -> float:
    """Return the mean loss over at most ``limit`` consecutive held-out windows, in nats per token."""
    count = min(limit, (len(stream) - 1) // length)
    losses = []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for i in range(count):
            window = torch.from_numpy(stream[i * length : (i + 1) * length].astype(np.int64))[None]
            losses.append(lm_loss(model, window).item())
    return sum(losses) / count


def make_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the hidden matrices, and AdamW for embedding and norms."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    matrices = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in matrices]
    muon = torch.optim.Muon(hidden, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=lr / 2, betas=(0.9, 0.95), weight_decay=0.0)]


def schedule(step: int, steps: int, warmup: int = 40, decay: float = 0.4) -> float:
    """Return the learning rate's factor: warm-up, constant, then linear to zero over the last ``decay`` of steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps))


def learning_rate(step: int, args: PretrainOptions) -> float:
    """Return the learning rate's factor of a step; the polishing steps restart at 0.35 and fall to zero."""
    if step < args.main_steps:
        return schedule(step, args.main_steps)
    return 0.35 * (args.steps - step) / args.polish_steps


def training_batch(step: int, args: PretrainOptions, stream: np.ndarray, openings: np.ndarray) -> torch.Tensor:
    """Return the tokens of a step: int64 [batch, length], or about as many tokens in shorter prompt-like excerpts."""
    if step < args.main_steps or step % 2 == 0 or not len(openings):
        return torch.from_numpy(corpus.windows(stream, args.length, args.batch, step, args.seed))
    count = max(1, args.batch * args.length // OPENING_LENGTH)
    rows = np.arange(count) + (step - args.main_steps) // 2 * count
    return torch.from_numpy(openings[rows % len(openings)])


def train(
    args: PretrainOptions,
    model: LlamaForCausalLM,
    train_stream: np.ndarray,
    openings: np.ndarray,
    held_stream: np.ndarray,
    group: Group,
) -> None:
    """Run the training loop in place, from the checkpoint in ``work/state`` if there is one."""
    optimizers = make_optimizers(model, args.lr)
    base_lrs = [o.param_groups[0]["lr"] for o in optimizers]
    checkpoint, steps = Path(args.out, "work", "state"), args.steps
    checkpoint.mkdir(exist_ok=True)
    first = fsdp.load_checkpoint(checkpoint, model, optimizers, group)
    compiled = torch.compile(lm_loss, dynamic=False) if args.compile else lm_loss
    started = time.monotonic()
    for step in range(first, steps):
        tokens = training_batch(step, args, train_stream, openings)
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
            fsdp.save_checkpoint(checkpoint, model, optimizers, step + 1, group)
            print(f"step {step + 1} held-out loss {held_out_loss(model, held_stream, limit=16):.3f}", flush=True)


def run(args: PretrainOptions, group: Group) -> dict:
    """Train the tokenizer and the backbone and write the checkpoint; returns the content of ``work/pretrain.json``.

    ValueError for more than one rank or without --out.
    """
    if group.size > 1 or not args.out:
        raise ValueError("pretrain needs --out and runs on one rank: start it without torchrun")
    torch.manual_seed(args.seed)
    out = Path(args.out)
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    config = demo_config(args.vocab_size, args.hidden_size, args.num_layers)
    train_files, _ = corpus.split(corpus.standard_library_files())
    if not (out / "tokenizer.json").exists():
        corpus.train_tokenizer(train_files, args.vocab_size, config.max_position_embeddings).save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    train_stream, held_stream = corpus.streams(tokenizer)
    print(f"{len(train_stream)} training tokens, {len(held_stream)} held out", flush=True)
    model = LlamaForCausalLM(config)
    count = args.polish_steps // 2 * args.batch * args.length // OPENING_LENGTH
    openings = corpus.openings(tokenizer, train_files, OPENING_LENGTH, max(1, count), args.seed)
    train(args, model, train_stream, openings, held_stream, group)
    report = {"held_out_loss": held_out_loss(model, held_stream), "train_tokens": len(train_stream)}
    report |= {"held_out_tokens": len(held_stream), "parameters": sum(p.numel() for p in model.parameters())}
    model.to(torch.bfloat16).save_pretrained(out)
    (work / "pretrain.json").write_text(json.dumps(report, indent=1))
    return report
