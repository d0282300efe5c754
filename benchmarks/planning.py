"""Time the scheduler takes for a step: planning, trees included, and learning from the result.

``python -m euryale.benchmarks.planning`` decodes random tokens with random head candidates. It reports medians over
steps of the whole of ``Scheduler.plan`` and ``Scheduler.advance``. Dynamic trees select up to ``--draft-tokens`` per
request, out of all proposals of heads, text, traffic and context.
"""

import argparse
import json
import statistics
import time

import numpy as np

from euryale.benchmarks import arguments
from euryale.benchmarks.arguments import number
from euryale.benchmarks.machine import describe
from euryale.scheduler.limits import SchedulerLimits
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.scheduler import Scheduler
from euryale.scheduler.speculation.drafter import Drafter
from euryale.scheduler.speculation.dynamic_drafter import DynamicDrafter
from euryale.scheduler.step_plan import StepPlan
from euryale.scheduler.step_result import HeadCandidates, SegmentResult

VOCAB, HEADS, RANKS, PROMPT, PAGE = 32000, 4, 10, 200, 16


def random_results(plan: StepPlan, rng: np.random.Generator) -> list[SegmentResult]:
    """Return results in which each node's first child is accepted with probability one half."""
    found = []
    for segment in plan.segments:
        if not segment.emits_tokens:
            continue
        path: list[int] = []
        node, parents = 0, segment.parents.tolist()
        while node in parents[node:] and rng.random() < 0.5:
            node = parents.index(node, node) + 1
            path.append(node)
        root = segment.num_new_tokens - 1
        tokens = [int(segment.tokens[root + n]) for n in path] + [int(rng.zipf(1.3)) % VOCAB]
        ids = rng.integers(0, VOCAB, (HEADS, RANKS)).astype(np.int32)
        logits = -np.sort(rng.exponential(2.0, (HEADS, RANKS)).astype(np.float32), axis=1)
        found.append(SegmentResult(tokens=tokens, accepted_nodes=path, head_candidates=HeadCandidates(ids, logits)))
    return found


def measure(requests: int, drafter: Drafter | None, steps: int) -> dict[str, float]:
    """Return median milliseconds of ``plan`` and ``advance``, and the median number of draft tokens per request."""
    longest = PROMPT + 16 * steps
    limits = SchedulerLimits(
        max_model_len=longest,
        max_num_seqs=requests,
        max_num_batched_tokens=requests * 128,
        vocab_size=VOCAB,
        num_pages=requests * (longest // PAGE + 1),
        page_size=PAGE,
    )
    scheduler, rng = Scheduler(limits, drafter), np.random.default_rng(0)
    params = SamplingParams(max_tokens=longest - PROMPT, ignore_eos=True)
    for key in range(requests):
        prompt = (rng.zipf(1.3, PROMPT) % VOCAB).astype(np.int32)
        scheduler.add(Request(key=key, prompt=prompt, params=params))
    found: dict[str, list[float]] = {"plan": [], "advance": [], "num_draft_tokens": []}
    for step in range(steps):
        started = time.perf_counter()
        planned = scheduler.plan(1, 0)
        plan_seconds = time.perf_counter() - started
        results = random_results(planned.plan, rng)
        begun = time.perf_counter()
        scheduler.observe(scheduler.advance(planned, results), 1e-3)
        if step > 3:
            found["plan"].append(1e3 * plan_seconds)
            found["advance"].append(1e3 * (time.perf_counter() - begun))
            found["num_draft_tokens"].append(sum(s.num_draft_tokens for s in planned.plan.segments) / requests)
    return {name: statistics.median(values) for name, values in found.items()}


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=number(1), nargs="+", default=[1, 8, 64, 512])
    parser.add_argument(
        "--draft-tokens", type=number(0, 127), nargs="+", default=[0, 4, 16, 64], help="maximum of each request"
    )
    parser.add_argument("--steps", type=number(8), default=60)
    return parser


def main(args: argparse.Namespace) -> None:
    print(describe() + "\n\n| requests | draft tokens each | plan, ms | advance, ms |\n|---|---|---|---|")
    rows = []
    for requests in args.requests:
        for max_draft_tokens in args.draft_tokens:
            drafter = DynamicDrafter(HEADS, max_draft_tokens) if max_draft_tokens else None
            row: dict[str, float] = {"requests": requests, "max_draft_tokens": max_draft_tokens}
            row |= measure(requests, drafter, args.steps)
            rows.append(row)
            print(
                f"| {requests} | {row['num_draft_tokens']:.0f} | {row['plan']:.3f} | {row['advance']:.3f} |", flush=True
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
