"""Effect of arriving prompts on running requests: one long prompt, or many prompts with a common prefix.

``python -m euryale.benchmarks.arrivals long-prompt`` submits a prompt of 4,000 tokens while eight streams run, with and
without ``--max-itl``. It reports the streams' inter-token latency and the prompt's time to first token.

``... shared-prefix`` sends 32 prompts with the same first 1,000 tokens, with and without the prefix cache, and counts
the computed prompt rows. Weights are random.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

from euryale.benchmarks import arguments
from euryale.benchmarks.arguments import number
from euryale.benchmarks.machine import describe
from euryale.benchmarks.random_model import SHAPES, make_engine
from euryale.parallel.group import single
from euryale.runtime.engine import Engine
from euryale.runtime.model.config import DTYPES
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams


def prompt_of(rng: np.random.Generator, length: int) -> np.ndarray:
    """Return ``length`` random token ids, int32."""
    return rng.integers(3, 1000, length).astype(np.int32)


def make(args: argparse.Namespace, num_seqs: int, longest: int, **options: Any) -> Engine:
    """Return an engine for prompts of at most ``longest`` tokens; ``options`` are those of EngineConfig."""
    longest += 2048
    return make_engine(
        args.model,
        DTYPES[args.dtype],
        None,
        longest,
        single(),
        num_seqs=num_seqs,
        device="cpu",
        cost_cache=False,
        **options,
    )


def long_prompt(args: argparse.Namespace, max_itl: float) -> dict:
    """Run once and return percentiles of the streams' inter-token latency, ms, before and after the prompt's arrival,
    its time to first token, ms, and the steps until then."""
    engine, rng = make(args, args.streams + 1, args.prompt, max_itl=max_itl), np.random.default_rng(0)
    scheduler = engine.scheduler
    assert scheduler is not None, "this rank is the leader"
    params = SamplingParams(max_tokens=2000, ignore_eos=True)
    streams = [Request(key=i, prompt=prompt_of(rng, 32), params=params) for i in range(args.streams)]
    for stream in streams:
        scheduler.add(stream)
    last: dict[int, float] = {}
    gaps: dict[bool, list[float]] = {False: [], True: []}
    late = Request(key=args.streams, prompt=prompt_of(rng, args.prompt), params=SamplingParams(max_tokens=8))

    def step(has_prompt: bool) -> None:
        for output in engine.step().outputs:
            now, key = time.perf_counter(), output.key
            if key in last and output.tokens and key != late.key:
                gaps[has_prompt].append((now - last[key]) / len(output.tokens))
            last[key] = now

    for _ in range(30):
        step(False)
    gaps[False].clear()
    for _ in range(30):
        step(False)
    scheduler.add(late)
    started = time.perf_counter()
    steps = 0
    while not late.output:
        step(True)
        steps += 1
    found: dict[str, float] = {"max_itl_ms": max_itl, "ttft_ms": 1e3 * (time.perf_counter() - started), "steps": steps}
    for name, values in (("alone", gaps[False]), ("loaded", gaps[True])):
        found |= {f"{name}_p{p}_ms": 1e3 * float(np.percentile(values, p)) for p in (50, 99)}
    return found


def shared_prefix(args: argparse.Namespace, caching: bool) -> dict:
    """Run once and return the computed prompt rows, and the seconds until all requests have their first token."""
    engine = make(args, args.requests, args.shared + args.own, enable_prefix_caching=caching)
    rng = np.random.default_rng(0)
    scheduler = engine.scheduler
    assert scheduler is not None, "this rank is the leader"
    shared = prompt_of(rng, args.shared)
    requests = [
        Request(
            key=key,
            prompt=np.concatenate([shared, prompt_of(rng, args.own)]),
            params=SamplingParams(max_tokens=8, ignore_eos=True),
        )
        for key in range(args.requests)
    ]
    plans = []
    for request in requests:
        scheduler.add(request)
    started = time.perf_counter()
    while not all(r.output for r in requests):
        plans.append(engine.step().planned.plan)
    seconds = time.perf_counter() - started
    rows = sum(s.num_new_tokens for plan in plans for s in plan.segments if s.output_index == 0)
    return {"prefix_caching": caching, "prompt_rows": rows, "seconds": seconds}


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("long-prompt", "shared-prefix"))
    parser.add_argument("--model", choices=SHAPES, default="demo-6m")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--prompt", type=number(64), default=4000, help="tokens of the long prompt")
    parser.add_argument("--streams", type=number(1), default=8, help="running streams")
    parser.add_argument(
        "--bounds", type=float, nargs="+", default=[0.0, 40.0, 20.0], help="--max-itl of each run, in ms"
    )
    parser.add_argument("--requests", type=number(1), default=32, help="requests with the common prefix")
    parser.add_argument("--shared", type=number(1), default=1000, help="tokens of the common prefix")
    parser.add_argument("--own", type=number(1), default=24, help="tokens of each prompt after the prefix")
    return parser


def main(args: argparse.Namespace) -> None:
    with torch.inference_mode():
        if args.what == "long-prompt":
            rows = [long_prompt(args, max_itl) for max_itl in args.bounds]
        else:
            rows = [shared_prefix(args, caching) for caching in (False, True)]
    print(describe())
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
