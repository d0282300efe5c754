"""Tokens per step of static trees, and of dynamic trees with and without each of their sources, for one request at a
time.

``python -m euryale.benchmarks.trees --model DIR --medusa DIR --gsm8k FILE --published TREE.json`` decodes held-out code
and GSM8K questions, greedily and sampled with seeds. Every run starts with the calibration beside the heads and learns
from its own answers only.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from euryale.benchmarks import arguments
from euryale.benchmarks.arguments import number
from euryale.benchmarks.machine import describe
from euryale.benchmarks.prompts import code_prompts, gsm8k_prompts
from euryale.frontend.tokenizer import load_tokenizer
from euryale.parallel.group import single
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams

SOURCES = ("text", "traffic", "context")
_OFF = {f"draft_from_{source}": False for source in SOURCES}
KINDS: dict[str, dict[str, Any]] = {
    "heads alone": _OFF,
    "and text": _OFF | {"draft_from_text": True},
    "and traffic": _OFF | {"draft_from_traffic": True},
    "and context": _OFF | {"draft_from_context": True},
    "all but text": {"draft_from_text": False},
    "all but traffic": {"draft_from_traffic": False},
    "all but context": {"draft_from_context": False},
    "dynamic": {},
}


def tokens_per_step(config: EngineConfig, prompts: list[list[int]], params: SamplingParams) -> float:
    """Return the mean tokens per step of consecutive answers; the steps that end a prompt count too."""
    engine, tokens, steps = Engine(config, single()), 0, 0
    scheduler = engine.scheduler
    assert scheduler is not None, "this rank is the leader"
    for key, prompt in enumerate(prompts):
        seeded = dataclasses.replace(params, seed=key)
        request = Request(key=key, prompt=np.asarray(prompt, dtype=np.int32), params=seeded)
        scheduler.add(request)
        while scheduler.has_work:
            engine.step()
        tokens, steps = tokens + len(request.output), steps + len(request.tokens_per_step)
    return tokens / steps


def static_trees(args: argparse.Namespace, directory: Path) -> dict[int, dict[str, str]]:
    """Return number of draft tokens -> name -> --tree, from the heads' calibration. ValueError for a size it lacks."""
    calibration = json.loads(Path(args.medusa or args.model, "calibration.json").read_text())
    found: dict[int, dict[str, str]] = {}
    for row in calibration["trees"]:
        if row["num_draft_tokens"] in args.sizes:
            path = directory / f"{row['num_draft_tokens']}.json"
            path.write_text(json.dumps(row["paths"]))
            found[row["num_draft_tokens"]] = {"searched": f"static:{path}"}
    if missing := [size for size in args.sizes if size not in found]:
        raise ValueError(
            f"the calibration has no trees of {missing} draft tokens: give --sizes of tree_search.TREE_SIZES"
        )
    return found


def measure(args: argparse.Namespace, prompts: list[list[int]], params: SamplingParams, trees: dict) -> dict:
    """Return the rows of one workload: name -> size -> tokens per step."""
    base = EngineConfig(model=args.model, medusa=args.medusa, dtype=args.dtype, max_num_seqs=1, tree="chain")
    rows: dict[str, dict] = {"chain": {"": tokens_per_step(base, prompts, params)}}
    if args.published:
        tree = f"static:{args.published}"
        rows["published"] = {"": tokens_per_step(dataclasses.replace(base, tree=tree), prompts, params)}
    for size in args.sizes:
        tree = trees[size]["searched"]
        found = tokens_per_step(dataclasses.replace(base, tree=tree), prompts, params)
        rows.setdefault("searched", {})[size] = found
        for name, changes in KINDS.items():
            config = dataclasses.replace(base, tree=f"dynamic:{size}", **changes)
            rows.setdefault(name, {})[size] = tokens_per_step(config, prompts, params)
    return rows


def show(title: str, rows: dict, sizes: list[int]) -> None:
    """Print the rows as Markdown, and the gain of dynamic over searched trees."""
    print(f"\n{title}\n\n| tokens per step | " + " | ".join(f"{n} draft tokens" for n in sizes) + " |")
    print("|---" * (1 + len(sizes)) + "|")
    for name, row in rows.items():
        cells = [f"{row[n]:.2f}" for n in sizes] if "" not in row else [f"{row['']:.2f}", *[""] * (len(sizes) - 1)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    gains = [f"{100 * (rows['dynamic'][n] / rows['searched'][n] - 1):.0f} %" for n in sizes]
    print("| dynamic over searched | " + " | ".join(gains) + " |")


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--medusa", default="")
    parser.add_argument("--published", type=Path, help="a published tree, at most as deep as the number of heads")
    parser.add_argument("--gsm8k", type=Path, help="JSONL of GSM8K questions, an additional workload")
    parser.add_argument("--sizes", type=number(1, 127), nargs="+", default=[8, 16, 63])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--count", type=number(1), default=24, help="prompts per workload")
    parser.add_argument("--max-tokens", type=number(1), default=128)
    parser.add_argument("--dtype", default="float32")
    return parser


def main(args: argparse.Namespace) -> None:
    texts = {"held-out code": code_prompts(args.count)}
    if args.gsm8k:
        texts["GSM8K"] = gsm8k_prompts(args.gsm8k, args.count)
    tokenizer = load_tokenizer(args.model)
    report: dict[str, Any] = {"machine": describe(), "sizes": args.sizes, "rows": {}}
    print(report["machine"])
    with tempfile.TemporaryDirectory() as directory:
        trees = static_trees(args, Path(directory))
        for name, prompts in texts.items():
            tokens = [tokenizer.encode(text) for text in prompts]
            for temperature in args.temperatures:
                params = SamplingParams(max_tokens=args.max_tokens, temperature=temperature, ignore_eos=True)
                title = f"{name}, {'greedy' if not temperature else f'temperature {temperature}'}"
                report["rows"][title] = rows = measure(args, tokens, params, trees)
                show(title, rows, args.sizes)
    print(json.dumps(report))


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
