"""Tokens per second while something else keeps one core busy, over tokens per second without it.

``python -m euryale.benchmarks.contention --model demo/model`` measures one rank with a thread for each core; under
``torchrun --nproc-per-node 2 -m`` the ranks divide the cores. Undisturbed and disturbed rounds take turns: beside a
disturbed one an endless loop runs, pinned to one core, in a session of its own as another user's work would be.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from euryale.benchmarks import arguments
from euryale.benchmarks.arguments import number
from euryale.benchmarks.machine import describe
from euryale.benchmarks.random_model import SHAPES, make_engine
from euryale.parallel.group import Group, join
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine
from euryale.runtime.model.config import DTYPES
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams

PROMPT = 32  # tokens
# Dies with its parent (PR_SET_PDEATHSIG), however that ends; a parent that died before is the other case.
LOOP = """
import ctypes, os, signal
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.sched_setaffinity(0, [{core}])
print(flush=True)
while os.getppid() == {parent}:
    pass
"""


@contextmanager
def busy(core: int) -> Iterator[None]:
    """Keep ``core`` busy with a process of its own."""
    command = [sys.executable, "-c", LOOP.format(core=core, parent=os.getpid())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it is about to loop
        yield
    finally:
        process.kill()
        process.communicate()


def load_engine(args: argparse.Namespace, group: Group) -> Engine:
    """An engine of one request without speculation, whose model is a directory or random weights of a named shape."""
    max_len = PROMPT + args.tokens
    if args.model in SHAPES:
        return make_engine(args.model, DTYPES[args.dtype], None, max_len, group, device="cpu")
    config = EngineConfig(
        model=args.model,
        tree="off",
        dtype=args.dtype,
        max_model_len=max_len,
        max_num_seqs=1,
        enable_prefix_caching=False,  # every round asks the same prompt
        device="cpu",
    )
    return Engine(config, group)


def tokens_per_second(engine: Engine, tokens: int) -> float:
    """Speed of one greedy answer of so many tokens, the step of its prompt left out. The leader's to call."""
    prompt = np.arange(1, PROMPT + 1, dtype=np.int32)
    engine.scheduler.add(Request(key=0, prompt=prompt, params=SamplingParams(max_tokens=tokens, ignore_eos=True)))
    engine.step()
    started = time.perf_counter()
    while engine.scheduler.has_work:
        engine.step()
    return (tokens - 1) / (time.perf_counter() - started)


def measure(engine: Engine, args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of every round, with and without the busy core."""
    found: dict[str, list[float]] = {"undisturbed": [], "disturbed": []}
    tokens_per_second(engine, args.tokens)
    for _ in range(args.rounds):
        found["undisturbed"].append(tokens_per_second(engine, args.tokens))
        with busy(args.core):
            found["disturbed"].append(tokens_per_second(engine, args.tokens))
    return found


def show(report: dict) -> None:
    """The table for people, then the line for machines."""
    print(f"{report['machine']}\n{report['model']}, {report['dtype']}, one request, no speculation")
    print(f"{report['ranks']} ranks, {report['threads']} threads a rank; an endless loop on core {report['core']}")
    print(f"{'tokens/s':<12}{'median':>9}{'least':>9}{'most':>9}")
    for name, row in report["tokens_per_second"].items():
        print(f"{name:<12}{row['median']:>9.1f}{row['least']:>9.1f}{row['most']:>9.1f}")
    print(f"disturbed over undisturbed, median of rounds: {report['ratio']:.2f}")
    print(json.dumps(report))


def main(args: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))  # before ranks share them out
    args.core = cores[-1] if args.core is None else args.core
    if args.core not in cores:
        raise ValueError(f"--core {args.core} is none of the cores that this process may use: {cores}")
    group = join(device="cpu")
    with torch.inference_mode():
        engine = load_engine(args, group)
        if not group.is_leader:
            engine.follow()
        else:
            found = measure(engine, args)
            engine.stop()
    if group.is_leader:
        ratios = [d / u for u, d in zip(found["undisturbed"], found["disturbed"], strict=True)]
        report = {"machine": describe(), "model": Path(args.model).name, "dtype": args.dtype, "core": args.core}
        report |= {"ranks": group.size, "threads": torch.get_num_threads(), "tokens_per_second": {}}
        for name, speeds in found.items():
            row = {"median": statistics.median(speeds), "least": min(speeds), "most": max(speeds)}
            report["tokens_per_second"][name] = {word: round(speed, 2) for word, speed in row.items()}
        report["ratio"] = round(statistics.median(ratios), 3)
        show(report)
    engine.close()


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help=f"a directory, or random weights: {', '.join(SHAPES)}")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--tokens", type=number(2), default=64, help="tokens of an answer, one of which is not timed")
    parser.add_argument("--core", type=number(0), help="the busy core; the last one without this")
    parser.add_argument("--rounds", type=number(1), default=7)
    return parser


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
