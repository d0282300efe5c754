"""Records a model's answers with their head candidates, for ``simulate --recorded`` and ``shift``.

``python -m euryale.benchmarks.simulate.record_heads --model demo/model --out heads.npz`` has the model answer held-out
code, or the prompts of a GSM8K file. It writes the ``.npz`` that ``heads.RecordedAnswers`` describes.
"""

import argparse
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from euryale.benchmarks import arguments
from euryale.benchmarks.arguments import number
from euryale.benchmarks.prompts import code_prompts, gsm8k_prompts
from euryale.benchmarks.simulate.heads import RANKS
from euryale.frontend.tokenizer import load_tokenizer
from euryale.parallel.group import single
from euryale.training import backbone as backbones
from euryale.training.calibrate import as_windows, own_answers
from euryale.training.heads import Heads
from euryale.training.model import BackboneWithHeads
from euryale.training.options import CalibrateOptions
from euryale.training.packing import Batch


class CandidateModel(BackboneWithHeads):
    """The heads' candidates along given tokens."""

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the top RANKS tokens of every position and head, int64, and their logits, float32: [B, L, K, R]."""
        hidden_BLD = self.hidden_states(batch).float()
        with torch.no_grad():
            candidates = [self._head_logits(head, hidden_BLD).float().topk(RANKS) for head in self.heads]
        return torch.stack([c.indices for c in candidates], dim=2), torch.stack([c.values for c in candidates], dim=2)


def record(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Return the arrays of the file. ValueError if no prompt was answered."""
    group = single()
    backbone = backbones.load_backbone(args.model, torch.float32)
    vocab_size, hidden_size = backbone.get_output_embeddings().weight.shape
    heads = Heads.load(args.medusa, args.model, vocab_size, hidden_size).requires_grad_(False)
    model = CandidateModel(backbone, heads)
    texts = gsm8k_prompts(args.gsm8k, args.prompts) if args.gsm8k else code_prompts(args.prompts)
    tokenizer = load_tokenizer(args.model, vocab_size)
    longest = backbone.config.max_position_embeddings - args.max_tokens
    encoded = [np.asarray(tokenizer.encode(text)[:longest], dtype=np.int32) for text in texts]
    options = CalibrateOptions(model=args.model, data=("prompts above",), max_tokens=args.max_tokens)
    prompts = [e for e in encoded if len(e) > 1]
    written = [row for row in own_answers(options, prompts, group, args.temperature) if row["tokens"]]
    if not written:
        raise ValueError("no prompt was answered: raise --prompts or --max-tokens")
    windows = as_windows(written)
    tokens: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    logits: list[np.ndarray] = []
    for i, row in enumerate(written):
        tokens.append(np.asarray(row["prompt_tokens"] + row["tokens"], dtype=np.int32))
        for arrays, part in zip((ids, logits), model(windows.batch(np.asarray([i]))), strict=True):
            arrays.append(part[0, : len(tokens[-1])].numpy())
    return {
        "starts": np.cumsum([0, *map(len, tokens)]),
        "prompts": np.asarray([len(row["prompt_tokens"]) for row in written]),
        "tokens": np.concatenate(tokens),
        "ids": np.concatenate(ids).astype(np.int32),
        "logits": np.concatenate(logits).astype(np.float16),
        "vocab_size": np.asarray(vocab_size),
    }


def main(args: argparse.Namespace) -> None:
    arrays = record(args)
    try:
        with args.out.open("wb") as file:
            np.savez_compressed(file, **cast("dict[str, Any]", arrays))
    except OSError as error:
        raise ValueError(f"cannot write {args.out}: {error.strerror}") from error
    answered = len(arrays["tokens"]) - int(arrays["prompts"].sum())
    print(json.dumps({"answers": len(arrays["prompts"]), "tokens": answered, "heads": arrays["ids"].shape[1]}))


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--medusa", default="", help="directory of the heads (default: those inside --model)")
    parser.add_argument("--gsm8k", type=Path, help="JSONL of GSM8K questions, used instead of code")
    parser.add_argument("--prompts", type=number(1), default=100)
    parser.add_argument("--max-tokens", type=number(8), default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
