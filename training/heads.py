"""Medusa-1: train heads on a frozen backbone (Medusa paper, arXiv 2401.10774, sections 2.1, 2.2.1 and 2.3.2).

What a head should say is what the backbone will say, which a small backbone seldom has in common with the text.
So the labels are the backbone's own choices (the argmax at every position), on its own greedy answers to prompts
of the corpus and, every third step, on the corpus itself.

``python -m euryale.training.heads --model DIR`` reads the backbone in DIR and writes ``DIR/medusa/`` in the
layout of the first published heads: ``medusa_lm_head.safetensors`` (bfloat16) and ``config.json``. A killed run
goes on where its last checkpoint was written when the same command is given again.

Shape suffixes: B sequences, L positions, D hidden size, V vocabulary. This file does not know trees or acceptance.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from euryale.training import answers, corpus, pretrain

WEIGHTS_NAME = "medusa_lm_head.safetensors"


@dataclass(frozen=True, kw_only=True)
class HeadsOptions:
    """The command's flags. ``model``: the backbone's directory; ``answers`` prompts of ``prompt_tokens`` are each
    continued by ``answer_tokens``; ``tokens`` of training, repetitions counted, ``batch`` sequences per step;
    ``head_decay``: the weight of head k's loss is its k-th power."""

    model: Path
    num_heads: int = 4
    num_layers: int = 1
    answers: int = 2048
    prompt_tokens: int = 64
    answer_tokens: int = 192
    tokens: float = 2.4e6
    batch: int = 16
    lr: float = 3e-3
    head_decay: float = 0.8
    seed: int = 1
    compile: bool = True

    @property
    def length(self) -> int:
        """Tokens of every training sequence."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.batch * self.length))


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b), the identity at the start (paper, section 2.1.1)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.silu(self.linear(x))


class Heads(nn.ModuleList):
    """Medusa heads with an lm_head each. Head k, applied to the hidden state of position t after the backbone's
    final norm, predicts token t + 2 + k. The names of its parameters are those of the published files."""

    def __init__(self, num_heads: int, num_layers: int, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        for _ in range(num_heads):
            blocks = [ResidualBlock(hidden_size) for _ in range(num_layers)]
            self.append(nn.Sequential(*blocks, nn.Linear(hidden_size, vocab_size, bias=False)))

    @classmethod
    def like(cls, backbone: LlamaForCausalLM, num_heads: int, num_layers: int) -> "Heads":
        """Fresh heads: at step zero every one predicts what the backbone predicts."""
        weight_VD = backbone.lm_head.weight
        heads = cls(num_heads, num_layers, weight_VD.shape[1], weight_VD.shape[0])
        with torch.no_grad():
            for head in heads:
                head[-1].weight.copy_(weight_VD)
        return heads

    @classmethod
    def load(cls, directory: Path) -> "Heads":
        """Heads written by ``save``, in float32. The sizes are those of the tensors; RuntimeError for a missing
        or unknown tensor."""
        tensors = {name: tensor.float() for name, tensor in load_file(directory / WEIGHTS_NAME).items()}
        num_heads = 1 + max(int(name.split(".")[0]) for name in tensors)
        num_layers = max(int(name.split(".")[1]) for name in tensors)
        vocab_size, hidden_size = tensors[f"0.{num_layers}.weight"].shape
        heads = cls(num_heads, num_layers, hidden_size, vocab_size)
        heads.load_state_dict(tensors)
        return heads

    def save(self, directory: Path, base_model: str) -> None:
        """Write ``config.json`` and, last and whole or not at all, the weights in bfloat16."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {"medusa_num_heads": len(self), "medusa_num_layers": len(self[0]) - 1}
        config["base_model_name_or_path"] = base_model
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in self.state_dict().items()}
        unfinished = directory / f"{WEIGHTS_NAME}.tmp"
        save_file(tensors, unfinished, metadata={"format": "pt"})
        unfinished.replace(directory / WEIGHTS_NAME)


@torch.no_grad()
def look(backbone: LlamaForCausalLM, tokens_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states after the final norm [B, L, D], and the backbone's choice of the token after each position,
    int64 [B, L]."""
    hidden_BLD = backbone.model(tokens_BL, use_cache=False).last_hidden_state
    return hidden_BLD, F.linear(hidden_BLD, backbone.lm_head.weight).argmax(-1)


def heads_losses(heads: Heads, hidden_BLD: torch.Tensor, choices_BL: torch.Tensor) -> list[torch.Tensor]:
    """Mean cross-entropy (nats) of every head. Token t + 2 + k is the choice made at position t + 1 + k."""
    losses = []
    for k, head in enumerate(heads):
        logits = head(hidden_BLD[:, : -1 - k]).float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), choices_BL[:, 1 + k :].flatten()))
    return losses


def weighted(losses: list[torch.Tensor], head_decay: float) -> torch.Tensor:
    """The training loss, sum over k of head_decay^k times head k's loss (paper, section 2.2.1)."""
    return sum(head_decay**k * loss for k, loss in enumerate(losses))


@torch.no_grad()
def top1_accuracy(backbone, heads: Heads, answers_BL: torch.Tensor, prompt_tokens: int) -> list[float]:
    """Share of positions within the answers where a head's first guess is what the backbone wrote."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, choices = look(backbone, answers_BL)
        first = prompt_tokens - 1  # the prompt's last token: its guesses are all about the answer
        guesses = [head(hidden[:, first : -1 - k]).argmax(-1) for k, head in enumerate(heads)]
    right = [(guess == choices[:, first + 1 + k :]).float().mean() for k, guess in enumerate(guesses)]
    return [share.item() for share in right]


def make_optimizers(heads: Heads, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the residual blocks' matrices, AdamW for biases and lm_heads."""
    muon = [p for n, p in heads.named_parameters() if n.endswith("linear.weight")]
    rest = [p for n, p in heads.named_parameters() if not n.endswith("linear.weight")]
    optimizers = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    if muon:  # none without residual blocks
        optimizers.append(torch.optim.Muon(muon, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def training_batch(args: HeadsOptions, stream: np.ndarray, own_answers: np.ndarray, step: int) -> torch.Tensor:
    """The tokens of a step, int64 [batch, length]: two of answers, then one of the corpus."""
    if step % 3 == 2:
        return torch.from_numpy(corpus.windows(stream, args.length, args.batch, step // 3, args.seed))
    return torch.from_numpy(answers.shuffled(own_answers, args.batch, step - step // 3, args.seed))


def train(args: HeadsOptions, backbone, heads: Heads, stream, own_answers, held_answers, work: Path) -> None:
    """Run the training loop in place, resuming from ``work/heads.pt`` if it is there."""
    optimizers = make_optimizers(heads, args.lr)
    base_lrs = [o.param_groups[0]["lr"] for o in optimizers]
    checkpoint, steps = work / "heads.pt", args.steps
    first = pretrain.load_checkpoint(checkpoint, heads, optimizers)
    looks, losses_of = (torch.compile(look), torch.compile(heads_losses)) if args.compile else (look, heads_losses)
    started = time.monotonic()
    for step in range(first, steps):
        tokens = training_batch(args, stream, own_answers, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = losses_of(heads, *looks(backbone, tokens))
        weighted(losses, args.head_decay).backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        for optimizer, base in zip(optimizers, base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = base * pretrain.schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            rate = (step - first + 1) * tokens.numel() / (time.monotonic() - started)
            shown = " ".join(f"{loss.item():.3f}" for loss in losses)
            print(f"step {step}/{steps} losses {shown} {rate:.0f} tokens/s", flush=True)
        if (step + 1) % pretrain.CHECKPOINT_STEPS == 0 or step == steps - 1:
            pretrain.save_checkpoint(checkpoint, heads, optimizers, step + 1)
            shown = " ".join(f"{a:.3f}" for a in top1_accuracy(backbone, heads, held_answers, args.prompt_tokens))
            print(f"step {step + 1} held-out top-1 {shown}", flush=True)


def run(args: HeadsOptions) -> dict:
    """Write answers, train, write the heads; returns the numbers of ``work/heads.json``."""
    torch.manual_seed(args.seed)
    work = args.model / "work"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    stream, held_stream = corpus.streams(tokenizer)
    backbone = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).requires_grad_(False).eval()
    prompts = answers.spaced_prompts(stream, args.answers, args.prompt_tokens)
    own_answers = answers.write_answers(backbone, prompts, args.answer_tokens, work)
    held_prompts = answers.spaced_prompts(held_stream, min(32, args.answers), args.prompt_tokens)
    held_answers = answers.continue_greedily(backbone, held_prompts, args.answer_tokens)
    backbone.float()
    heads = Heads.like(backbone, args.num_heads, args.num_layers)
    train(args, backbone, heads, stream, own_answers, held_answers, work)
    report = {"top1": top1_accuracy(backbone, heads, held_answers, args.prompt_tokens), "steps": args.steps}
    report["parameters"] = sum(p.numel() for p in heads.parameters())
    heads.save(args.model / "medusa", "..")
    (work / "heads.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    run(pretrain.options_from_flags(HeadsOptions, __doc__))
