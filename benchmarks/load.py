"""Tokens per second by number of concurrent requests, for every kind of tree and for plain decoding.

``python -m euryale.benchmarks.load --model DIR --medusa DIR --published TREE.json --out DIR`` decodes held-out code at
each concurrency with every kind. Concurrency is constant: a request that ends is replaced by the next prompt at once,
and what is timed begins and ends in the midst of that. In a round all kinds take short turns. Ratios are taken within a
round; their interval is the bootstrap interval of the median over rounds. Dynamic trees do not learn from traffic here,
because every round uses the same prompts.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

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

PLAIN, DYNAMIC = "plain", "dynamic"
MIN_ANSWERS = 16  # worth of tokens that are timed in a round
TURN = 0.1  # seconds


def kinds(args: argparse.Namespace, directory: Path) -> dict[str, str]:
    """Return name -> --tree; the searched tree is the calibration's best tree of ``args.searched`` draft tokens."""
    calibration = json.loads(Path(args.medusa or args.model, "calibration.json").read_text())
    searched = [row["paths"] for row in calibration["trees"] if row["num_draft_tokens"] == args.searched]
    if not searched:
        raise ValueError(f"the calibration has no tree of {args.searched} draft tokens: see tree_search.TREE_SIZES")
    path = directory / "searched.json"
    path.write_text(json.dumps(searched[0]))
    if args.only_plain:
        return {PLAIN: "off", DYNAMIC: "dynamic"}
    found = {PLAIN: "off", "chain": "chain", f"searched ({args.searched})": f"static:{path}", DYNAMIC: "dynamic"}
    if args.published:
        found["published"] = f"static:{args.published}"
    return found


def interval(ratios: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Return the median of the ratios, and the bounds of its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    drawn = np.median(rng.choice(ratios, (draws, len(ratios))), axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


class ConstantLoad:
    """An engine with ``load`` requests at all times: a request that ends is replaced by the next prompt."""

    def __init__(self, engine: Engine, prompts: list[list[int]], load: int, args: argparse.Namespace) -> None:
        self._engine, self._prompts, self._args = engine, prompts, args
        self._num_added = 0
        # The first answers' worth of tokens is not timed. Then as many tokens are timed as two or more answers of each
        # request have, so that every kind of decoding has its share of prompts in the time.
        self._warm_up = load * args.max_tokens
        self._wanted = max(2, MIN_ANSWERS // load) * load * args.max_tokens
        self.tokens = self.steps = 0
        self.seconds = 0.0
        for i in range(load):  # the first answers end at different times, as answers in service do
            self._add(args.max_tokens * (i + 1) // load)

    @property
    def is_done(self) -> bool:
        """Whether all tokens are timed."""
        return self.tokens >= self._wanted

    def run(self, seconds: float) -> None:
        """Run steps for about ``seconds``."""
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds and not self.is_done:
            outputs = self._engine.step().outputs
            for output in outputs:
                if output.finish_reason:
                    self._add(self._args.max_tokens)
            if self._warm_up > 0:
                self._warm_up -= sum(len(output.tokens) for output in outputs)
                continue
            self.seconds += time.perf_counter() - started - elapsed
            self.tokens += sum(len(output.tokens) for output in outputs)
            self.steps += len(outputs)

    def stop(self) -> None:
        """Cancel the requests under way."""
        for key in range(self._num_added):
            self._engine.scheduler.cancel(key)

    def _add(self, max_tokens: int) -> None:
        key, self._num_added = self._num_added, self._num_added + 1
        params = SamplingParams(
            max_tokens=max(max_tokens, 1), ignore_eos=True, temperature=self._args.temperature, seed=key
        )
        prompt = np.asarray(self._prompts[key % len(self._prompts)], dtype=np.int32)
        self._engine.scheduler.add(Request(key=key, prompt=prompt, params=params))


def run_round(
    args: argparse.Namespace, engines: dict[str, Engine], prompts: list[list[int]], load: int
) -> dict[str, ConstantLoad]:
    """Run every engine at a load in turns of TURN seconds: whatever disturbs the machine for longer disturbs all."""
    loads = {name: ConstantLoad(engine, prompts, load, args) for name, engine in engines.items()}
    while not all(made.is_done for made in loads.values()):
        for made in loads.values():
            made.run(TURN)
    for made in loads.values():
        made.stop()
    return loads


def measure(args: argparse.Namespace, engines: dict[str, Engine], prompts: list[list[int]], load: int) -> dict:
    """Return the rows of one concurrency: tokens per second and per step, and ratios to plain decoding and to the best
    other kind."""
    run_round(args, engines, prompts, load)  # warms up
    rounds = [run_round(args, engines, prompts, load) for _ in range(args.rounds)]
    speeds = {name: [found[name].tokens / found[name].seconds for found in rounds] for name in engines}
    others = {name: float(np.median(s)) for name, s in speeds.items() if name != DYNAMIC}
    best = max(others, key=others.__getitem__)
    rows: dict[str, dict[str, Any]] = {}
    for name, rates in speeds.items():
        ratios = [a / b for a, b in zip(rates, speeds[PLAIN], strict=True)]
        last = rounds[-1][name]
        rows[name] = {"tokens_per_second": float(np.median(rates)), "tokens_per_step": last.tokens / last.steps}
        rows[name]["over_plain"] = interval(ratios)
    rows[DYNAMIC]["over_best"] = interval([a / b for a, b in zip(speeds[DYNAMIC], speeds[best], strict=True)])
    rows[DYNAMIC]["best"] = best
    return rows


def show(report: dict) -> None:
    """Print the report as Markdown."""
    names = list(next(iter(report["loads"].values())))
    print("\n| requests | " + " | ".join(names) + " | dynamic over plain | over the best other |")
    print("|---" * (len(names) + 3) + "|")
    for load, rows in report["loads"].items():
        cells = [f"{rows[n]['tokens_per_second']:,.0f} ({rows[n]['tokens_per_step']:.2f})" for n in names]
        ratios = ["{:.2f} ({:.2f}-{:.2f})".format(*rows[DYNAMIC][w]) for w in ("over_plain", "over_best")]
        print(f"| {load} | " + " | ".join(cells) + f" | {ratios[0]} | {ratios[1]}, {rows[DYNAMIC]['best']} |")


def draw(report: dict, path: Path) -> None:
    """Plot the speed relative to plain decoding against the number of requests."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    loads = list(report["loads"])
    for name in next(iter(report["loads"].values())):
        middle, low, high = zip(*(report["loads"][load][name]["over_plain"] for load in loads), strict=True)
        axes.plot(loads, middle, marker="o", label=name)
        axes.fill_between(loads, low, high, alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks(loads, [str(load) for load in loads])
    axes.set_xlabel("concurrent requests")
    axes.set_ylabel("tokens per second over plain decoding")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--medusa", default="")
    parser.add_argument("--published", type=Path, help="a published tree, at most as deep as the number of heads")
    parser.add_argument("--only-plain", action="store_true", help="compare dynamic trees with plain decoding alone")
    parser.add_argument("--searched", type=number(1), default=16, help="draft tokens of the searched tree")
    parser.add_argument("--gsm8k", type=Path, help="JSONL of GSM8K questions, used instead of held-out code")
    parser.add_argument("--loads", type=number(1), nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=number(1), default=128)
    parser.add_argument("--rounds", type=number(2), default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=number(1), default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="output directory of load.png")
    return parser


def main(args: argparse.Namespace) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)
    texts = gsm8k_prompts(args.gsm8k, 64) if args.gsm8k else code_prompts(64)
    tokenizer = load_tokenizer(args.model)
    prompts = [tokenizer.encode(text) for text in texts]
    report: dict[str, Any] = {"machine": describe(), "dtype": args.dtype, "threads": args.threads}
    report |= {"rounds": args.rounds, "loads": {}}
    with tempfile.TemporaryDirectory() as directory:
        engines = {
            name: Engine(
                EngineConfig(
                    model=args.model,
                    medusa=args.medusa,
                    dtype=args.dtype,
                    tree=tree,
                    max_num_seqs=max(args.loads),
                    enable_prefix_caching=False,
                    draft_from_traffic=False,
                    cost_cache=False,
                    device="cpu",
                ),
                single(),
            )
            for name, tree in kinds(args, Path(directory)).items()
        }
    for load in args.loads:
        report["loads"][load] = measure(args, engines, prompts, load)
        print(load, {n: round(r["tokens_per_second"]) for n, r in report["loads"][load].items()}, flush=True)
    show(report)
    if args.out:
        draw(report, args.out / "load.png")
    print(json.dumps(report))


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
