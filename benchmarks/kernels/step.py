"""Time of a step by its number of rows and the length of the context, and its parts.

``python -m euryale.benchmarks.kernels.step --model llama-110m --dtype bfloat16`` times whole steps of one request with
a tree: attention over random keys, verification, commit and Medusa heads. Each round runs all row counts, so that noise
affects them alike; reported are medians. Under torchrun the model is sharded over the ranks.
"""

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from euryale.benchmarks import arguments
from euryale.benchmarks.arguments import number
from euryale.benchmarks.kernels.parts import STEP, parts
from euryale.benchmarks.machine import describe, read_bandwidth
from euryale.benchmarks.random_model import PAGE, SHAPES, make_runner
from euryale.kernels.linear import quantize
from euryale.kernels.linear.quantize import QUANTIZATIONS
from euryale.parallel.group import Group, join
from euryale.runtime.model.config import DTYPES
from euryale.runtime.step import StepRunner
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_plan import Segment, StepPlan


def make_plan(runner: StepRunner, rows: int, context: int) -> StepPlan:
    """Return the plan of one request whose tree has ``rows`` nodes: five draft tokens below the root, and chains below
    these.

    With 0 ``rows`` it is a plain decoding step: one row and no heads.
    """
    wants_head_candidates, rows = rows > 0, max(rows, 1)
    parents = np.asarray([max(0, node - 5) for node in range(1, rows)], dtype=np.int32)
    pages = np.random.default_rng(0).permutation(runner.cache.pages.shape[2]).astype(np.int32)
    segment = Segment(
        tokens=np.arange(1, rows + 1, dtype=np.int32),
        parents=parents,
        pages=pages[: -(-(context + rows) // PAGE)],
        context=context,
        emits_tokens=True,
        wants_head_candidates=wants_head_candidates,
        output_index=0,
        params=SamplingParams(),
    )
    return StepPlan(segments=[segment])


def measure(runner: StepRunner, plans: dict[int, StepPlan], rounds: int) -> dict[int, float]:
    """Return the median seconds of a step for every number of rows."""
    found: dict[int, list[float]] = {rows: [] for rows in plans}
    for plan in plans.values():
        runner.run(plan)
        runner.run(plan)
    for _ in range(rounds):
        for rows, plan in plans.items():
            started = time.perf_counter()
            runner.run(plan)
            found[rows].append(time.perf_counter() - started)
    return {rows: statistics.median(seconds) for rows, seconds in found.items()}


def fractions(runner: StepRunner, plan: StepPlan, rounds: int) -> dict[str, float]:
    """Return each part's fraction of a step; "host" is the time outside recorded kernels."""
    found = parts(runner, plan, rounds)
    if not found:
        return {}
    step = found.pop(STEP)
    return {name: part / step for name, part in found.items()} | {"host": 1 - sum(found.values()) / step}


def weight_bytes(runner: StepRunner, quantization: str) -> int:
    """Return the bytes of the backbone's matrices on this rank, without the embedding."""
    linears = []
    for layer in runner.decoder.layers:
        linears += [layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj]
    # int4 has 4 bits, and per 32 inputs a scale and a zero point of 16 bits each; its lm_head is int8.
    whole = 8 * runner.cache.pages.element_size()
    bits, of_head = {"none": (whole, whole), "int8": (8, 8), "int4": (5, 8), "fp8": (8, 8)}[quantization]
    head = runner.decoder.lm_head
    total = sum(linear.out_features * linear.in_features for linear in linears) * bits
    return (total + head.out_features * head.in_features * of_head) // 8


def run(args: argparse.Namespace, group: Group) -> dict:
    """Return the figures of one model for all contexts."""
    dtype = DTYPES[args.dtype]
    report: dict[str, Any] = {"machine": describe(), "model": args.model, "dtype": args.dtype}
    report["quantization"] = args.quantization
    bandwidth = read_bandwidth(group.device)
    report |= {"world_size": group.size, "threads": torch.get_num_threads(), "read_GBps": round(bandwidth / 1e9, 1)}
    report["contexts"] = {}
    for context in args.contexts:
        runner = make_runner(args.model, dtype, context, group, args.eager, quantization=args.quantization)
        plans = {rows: make_plan(runner, rows, context) for rows in (0, *args.rows)}
        seconds = measure(runner, plans, args.rounds)
        kv = runner.cache.pages[:, :, 0].numel() * runner.cache.pages.element_size() / PAGE * context
        floor = (weight_bytes(runner, args.quantization) + kv) / bandwidth
        found = {}
        for rows, total in seconds.items():
            of_step = fractions(runner, plans[rows], args.rounds)
            found[rows] = {
                "ms": round(total * 1e3, 3),
                "x_plain": round(total / seconds[0], 3),
                "x_byte_floor": round(total / floor, 2),
                "fractions": {name: round(part, 4) for name, part in of_step.items()},
            }
        report["contexts"][context] = found
    return report


def show(report: dict) -> None:
    """Print the table, and the report as JSON."""
    print(f"{report['model']}, {report['dtype']}, quantization {report['quantization']}")
    print(f"{report['world_size']} ranks, {report['threads']} threads per rank")
    print(f"{report['machine']}, reads {report['read_GBps']} GB/s; one request")
    for context, found in report["contexts"].items():
        print(f"\ncontext {context}\n{'rows':>5}{'ms':>9}{'x plain':>9}{'x floor':>9}  fractions of the step, %")
        for rows, row in found.items():
            of_step = ", ".join(f"{name} {100 * part:.1f}" for name, part in row["fractions"].items())
            print(f"{rows or 'plain':>5}{row['ms']:>9.3f}{row['x_plain']:>9.2f}{row['x_byte_floor']:>9.2f}  {of_step}")
    print(json.dumps(report))


def main(args: argparse.Namespace) -> None:
    group = join(device=args.device)
    quantize.check(args.quantization, group.device, DTYPES[args.dtype])
    with torch.inference_mode():
        report = run(args, group)
    if group.is_leader:
        show(report)
    group.close()


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="llama-110m")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none")
    parser.add_argument("--rows", type=number(1, 128), nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--contexts", type=number(1), nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=number(1), default=15)
    parser.add_argument("--eager", action="store_true", help="call every kernel from Python")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
