"""Comparison of trained Medusa heads: accuracy, tokens per step by tree, speed, and the backbone's loss.

``python -m euryale.benchmarks.heads --base DIR --variant NAME MODEL HEADS --variant ... --published TREE.json``
compares checkpoints that ``launch/train.py`` trained and calibrated; HEADS is "" for heads merged into MODEL. Prompts
are held-out code and answers are greedy. Every checkpoint's trees are compared with its own plain decoding, interleaved
round by round.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from euryale.benchmarks import arguments
from euryale.benchmarks.compare.peer_process import Answered
from euryale.benchmarks.compare.peers import run_engine, steps_of
from euryale.benchmarks.prompts import code_prompts
from euryale.frontend.tokenizer import load_tokenizer
from euryale.parallel.group import single
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine
from euryale.scheduler.speculation.tree import load_tree
from euryale.training import backbone, losses
from euryale.training.corpus import is_held_out
from euryale.training.data import read_pieces, tokenize
from euryale.training.packing import Windows, pack


def held_out_windows(model: str, length: int = 512) -> Windows:
    """Return windows of the standard library's held-out files."""
    tokenizer = load_tokenizer(model)
    pieces = [p for p in read_pieces(("stdlib",), tokenizer) if is_held_out(p.key)]
    return pack(tokenize(pieces, tokenizer, len(tokenizer)), length, tokenizer.eos_token_id)


@torch.no_grad()
def held_out_loss(model: str, windows: Windows, count: int) -> float:
    """Return the backbone's loss over ``count`` evenly spaced windows, nats per token, in float32."""
    decoder = backbone.load_backbone(model, torch.float32)
    total, number = 0.0, 0
    for index in windows.spaced_indices(count):
        batch = windows.batch(np.asarray([index]))
        targets = losses.next_tokens(batch)
        hidden = decoder.model(batch.tokens, position_ids=batch.positions, use_cache=False).last_hidden_state
        total += float(losses.cross_entropy(decoder.lm_head, hidden, targets, decoder.config.vocab_size))
        number += int((targets >= 0).sum())
    return total / number


def trees_of(calibration: dict, published: Path | None, directory: Path) -> dict[str, str]:
    """Return name -> --tree of all trees to compare.

    These are no tree, a chain, the published tree cut to the number of heads, a searched tree of the same size, and the
    tree beside the heads. ValueError if there is no searched tree of that size.
    """
    num_heads, found = len(calibration["accuracy"]), {"off": "off", "chain": "chain"}

    def store(name: str, paths: list[list[int]]) -> None:
        path = directory / f"{name}.json"
        path.write_text(json.dumps(paths))
        found[f"{name} ({len(paths)})"] = str(path)

    if published:
        whole = load_tree(published, 1 << 10)
        cut = whole.limited(whole.num_draft_tokens, num_heads).paths()
        same = next((row["paths"] for row in calibration["trees"] if row["num_draft_tokens"] == len(cut)), None)
        if same is None:
            sizes = [row["num_draft_tokens"] for row in calibration["trees"]]
            raise ValueError(
                f"{published} cut to {num_heads} heads has {len(cut)} draft tokens, calibrated "
                f"trees have {sizes}: add this size to tree_search.TREE_SIZES and calibrate again"
            )
        store("published", cut)
        store("searched", same)
    store("tree", calibration["tree"]["paths"])
    return found


def compare(model: str, heads: str, args: argparse.Namespace) -> dict:
    """Return the tokens per step of every tree of one checkpoint, and its speed relative to plain decoding."""
    calibration = json.loads(Path(heads or model, "calibration.json").read_text())
    prompts = [load_tokenizer(model).encode(text) for text in code_prompts(args.count)]
    with tempfile.TemporaryDirectory() as directory:
        trees = trees_of(calibration, args.published, Path(directory))
        base = EngineConfig(model=model, medusa=heads, dtype="float32", max_num_seqs=1, enable_prefix_caching=False)
        made = {name: Engine(dataclasses.replace(base, tree=tree), single()) for name, tree in trees.items()}
    found: dict[str, list[Answered]] = {name: [] for name in made}
    for engine in made.values():
        run_engine(engine, prompts[:1], args.max_tokens)  # the first calls allocate and warm caches
    for _ in range(args.rounds):
        for name, engine in made.items():
            found[name].append(run_engine(engine, prompts, args.max_tokens))
    tokens = len(prompts) * args.max_tokens
    rows: dict[str, dict[str, float]] = {}
    for name, rounds in found.items():
        ratio = statistics.median(p.seconds / r.seconds for p, r in zip(found["off"], rounds, strict=True))
        rows[name] = {"tokens_per_step": round(tokens / steps_of(rounds[-1]), 3), "x_plain": round(ratio, 3)}
        rows[name]["same"] = sum(a == b for a, b in zip(rounds[-1].answers, found["off"][-1].answers, strict=True))
    accuracy = {
        what: np.cumsum(calibration[what], axis=1)[:, :5].round(4).tolist() for what in ("accuracy", "text_accuracy")
    }
    return {"trees": rows, **accuracy}


def show(report: dict) -> None:
    """Print the report as Markdown."""
    variants = report["variants"]
    print("| | " + " | ".join(variants) + " |\n" + "|---" * (1 + len(variants)) + "|")
    for what, title in (("accuracy", "own answers"), ("text_accuracy", "held-out text")):
        for head in range(max(len(v[what]) for v in variants.values())):
            cells = [" / ".join(f"{100 * a:.1f}" for a in v[what][head]) for v in variants.values()]
            print(f"| head {head}, top-1 to top-5 on {title}, % | " + " | ".join(cells) + " |")
    for name in next(iter(variants.values()))["trees"]:
        rows = [v["trees"].get(name) for v in variants.values()]
        cells = [f"{r['tokens_per_step']:.2f} tokens/step, {r['x_plain']:.2f}x" if r else "" for r in rows]
        print(f"| {name} | " + " | ".join(cells) + " |")
    cells = [
        f"{v['held_out_loss']:.4f} ({100 * (v['held_out_loss'] / report['base_loss'] - 1):+.2f} %)"
        for v in variants.values()
    ]
    print(f"| backbone's held-out loss (before: {report['base_loss']:.4f}) | " + " | ".join(cells) + " |")


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="the backbone before training")
    parser.add_argument("--variant", nargs=3, action="append", required=True, metavar=("NAME", "MODEL", "HEADS"))
    parser.add_argument("--published", type=Path, help="a published tree, JSON of paths")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loss-windows", type=int, default=128)
    return parser


def main(args: argparse.Namespace) -> None:
    windows = held_out_windows(args.base)
    report: dict[str, Any] = {
        "base_loss": held_out_loss(args.base, windows, args.loss_windows),
        "threads": torch.get_num_threads(),
    }
    report |= {"rounds": args.rounds, "prompts": args.count, "max_tokens": args.max_tokens, "variants": {}}
    for name, model, heads in args.variant:
        found = compare(model, heads, args)
        report["variants"][name] = found | {"held_out_loss": held_out_loss(model, windows, args.loss_windows)}
    show(report)
    print(json.dumps(report))


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
