"""The plain and the overlapped engine loop: the host's part of the time of a decoding step.

``python -m euryale.benchmarks.kernels.loop --model llama-7b --rows 64`` decodes one request with random weights in
both loops, interleaved. It compares the time of a step with that of its recorded kernels alone. On a CPU, host and
device share the cores, so that little overlaps.
"""

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import msgpack
import numpy as np
import torch

from euryale.benchmarks import arguments
from euryale.benchmarks.arguments import number
from euryale.benchmarks.kernels.parts import STEP, parts
from euryale.benchmarks.machine import describe
from euryale.benchmarks.random_model import SHAPES, make_engine
from euryale.parallel.group import Group, join
from euryale.runtime.engine import Engine
from euryale.runtime.model.config import DTYPES
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.speculation.tree import default_tree
from euryale.scheduler.step_plan import StepPlan
from euryale.scheduler.step_result import RequestOutput

PROMPT = 32  # tokens


def decode(engine: Engine, loop: str, steps: int, key: int, plans: list[StepPlan] | None = None) -> float:
    """Return the median seconds of a decoding step of one request; the steps' plans are appended to ``plans``."""
    scheduler = engine.scheduler
    assert scheduler is not None, "this rank is the leader"
    engine.overlaps = loop == "overlapped"
    prompt = np.arange(1, PROMPT + 1, dtype=np.int32)
    params = SamplingParams(max_tokens=scheduler.limits.max_model_len - PROMPT, ignore_eos=True)
    scheduler.add(Request(key=key, prompt=prompt, params=params))
    engine.step()
    found: list[float] = []
    outputs: list[RequestOutput] = []
    for _ in range(steps):
        started = time.perf_counter()
        step = engine.step(partial(_pack, outputs))
        outputs = step.outputs
        if plans is not None:
            plans.append(step.planned.plan)
        found.append(time.perf_counter() - started)
        if any(o.finish_reason for o in outputs):
            break
    scheduler.cancel(key)
    return statistics.median(found)


def _pack(outputs: list[RequestOutput]) -> None:
    """Pack the previous step's tokens, as the server does while a step runs."""
    msgpack.packb([(o.key, o.tokens) for o in outputs])


def run(args: argparse.Namespace, group: Group) -> dict:
    """Run both loops and return their milliseconds per step, and those of the device."""
    tree = default_tree(4, args.rows - 1) if args.rows > 1 else None
    engine = make_engine(args.model, DTYPES[args.dtype], tree, args.max_len, group, device=group.device.type)
    found: dict[str, list[float]] = {"plain": [], "overlapped": []}
    plans: list[StepPlan] = []
    decode(engine, "plain", args.steps, -1)
    for key in range(args.rounds):
        for loop, seconds in found.items():
            seconds.append(decode(engine, loop, args.steps, 2 * key + (loop == "plain"), plans))
    report: dict[str, Any] = {
        "machine": describe(),
        "model": args.model,
        "dtype": args.dtype,
        "rows": args.rows,
        "loops": {},
    }
    last = next(plan for plan in reversed(plans) if plan.num_rows == args.rows)
    found_parts = parts(engine.runner, last, args.steps)
    del found_parts[STEP]
    device = sum(found_parts.values())
    report["device_ms"] = round(device * 1e3, 3)
    for loop, seconds in found.items():
        step = statistics.median(seconds)
        report["loops"][loop] = {"ms": round(step * 1e3, 3), "host_gap": round(1 - device / step, 3)}
    return report


def main(args: argparse.Namespace) -> None:
    with torch.inference_mode():
        report = run(args, join(device=args.device))
    print(f"{report['machine']}\n{args.model}, {args.dtype}, {args.rows} rows, one request")
    print(f"the device's part of a step: {report['device_ms']} ms")
    for loop, row in report["loops"].items():
        print(f"{loop:<12}{row['ms']:>9.3f} ms per step, of which host {100 * row['host_gap']:.1f} %")
    print(json.dumps(report))


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="llama-110m")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument(
        "--rows", type=number(1, 128), default=16, help="known and draft tokens of a step; 1: no speculation"
    )
    parser.add_argument("--max-len", type=number(2 * PROMPT), default=512, help="tokens of prompt and answer")
    parser.add_argument("--steps", type=number(1), default=60)
    parser.add_argument("--rounds", type=number(1), default=5)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
