"""Tokens per second at batch 1: transformers' greedy generate, plain decoding and Medusa trees, interleaved.

``python -m euryale.benchmarks.speed --model DIR --medusa DIR`` gives every system the same model, dtype, threads and
prompts, round by round, and reports medians over the rounds and ratios within them.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from euryale.benchmarks.oracle import Oracle
from euryale.benchmarks.prompts import code_prompts, gsm8k_prompts
from euryale.parallel.group import single
from euryale.runtime.config import DTYPES, EngineConfig
from euryale.runtime.engine import Engine
from euryale.runtime.tokenizer import load_tokenizer
from euryale.scheduler.params import SamplingParams
from euryale.scheduler.request import Request


def run_engine(engine: Engine, prompts: list[list[int]], max_tokens: int) -> tuple[float, int, list[list[int]]]:
    """Seconds, decoding steps and answers for the prompts one after the other."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    answers, steps, started = [], 0, time.perf_counter()
    for key, prompt in enumerate(prompts):
        request = Request(key=key, prompt=np.asarray(prompt, dtype=np.int32), params=params)
        engine.scheduler.add(request)
        while engine.scheduler.has_work:
            engine.step()
        answers.append(request.output)
        steps += len(request.accepted)
    return time.perf_counter() - started, steps, answers


def run_oracle(
    oracle: Oracle, prompts: list[list[int]], max_tokens: int, **options
) -> tuple[float, int, list[list[int]]]:
    started = time.perf_counter()
    answers = [oracle.greedy(p, max_tokens, ignore_eos=True, **options) for p in prompts]
    return time.perf_counter() - started, len(prompts) * max_tokens, answers


def systems(args: argparse.Namespace) -> dict:
    """Name -> function(prompts) of everything that is compared."""

    def engine(tree: str) -> Engine:
        return Engine(
            EngineConfig(model=args.model, medusa=args.medusa, tree=tree, dtype=args.dtype, max_num_seqs=1), single()
        )

    oracle, plain = Oracle(args.model, DTYPES[args.dtype]), engine("off")
    found = {
        "transformers": lambda p: run_oracle(oracle, p, args.max_tokens),
        "transformers, prompt lookup": lambda p: run_oracle(oracle, p, args.max_tokens, prompt_lookup_num_tokens=10),
        "plain": lambda p: run_engine(plain, p, args.max_tokens),
    }
    for tree in args.trees:
        made = engine(tree)
        found[f"Medusa {tree or 'tree'}"] = lambda p, made=made: run_engine(made, p, args.max_tokens)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--medusa", default="")
    parser.add_argument("--trees", nargs="+", default=["", "chain"], help="'' is the tree beside the heads")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--gsm8k", type=Path, help="measure on GSM8K questions instead of held-out code")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    tokenizer, runs = load_tokenizer(args.model), systems(args)
    texts = gsm8k_prompts(args.gsm8k, args.count) if args.gsm8k else code_prompts(args.count)
    prompts = [tokenizer.encode(text) for text in texts]
    tokens = len(prompts) * args.max_tokens
    for run in runs.values():
        run(prompts[:1])  # first calls compile, allocate and warm caches
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    steps, answers = {}, {}
    for _ in range(args.rounds):
        for name, run in runs.items():
            taken, steps[name], answers[name] = run(prompts)
            seconds[name].append(taken)
    report = {"dtype": args.dtype, "threads": torch.get_num_threads(), "rounds": args.rounds, "prompts": len(prompts)}
    print(f"{args.dtype}, {report['threads']} threads, {len(prompts)} prompts x {args.max_tokens} tokens, batch 1")
    print(f"{'system':<30}{'tokens/s':>10}{'tokens/step':>13}{'x plain':>9}{'x transformers':>16}{'same tokens':>13}")
    for name in runs:
        rate = tokens / statistics.median(seconds[name])

        def ratio(base: str, name=name) -> float:
            return statistics.median(b / s for b, s in zip(seconds[base], seconds[name], strict=True))

        same = sum(a == b for a, b in zip(answers[name], answers["transformers"], strict=True))
        row = {"tokens_per_second": round(rate, 1), "tokens_per_step": round(tokens / steps[name], 3)}
        row |= {"x_plain": round(ratio("plain"), 3), "x_transformers": round(ratio("transformers"), 3), "same": same}
        per_step = f"{row['tokens_per_step']:.2f}" if "transformers" not in name else "-"
        print(f"{name:<30}{rate:>10.1f}{per_step:>13}{row['x_plain']:>9.2f}{row['x_transformers']:>16.2f}{same:>13}")
        report[name] = row
    print(json.dumps(report))


if __name__ == "__main__":
    main()
