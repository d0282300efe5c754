"""The plain loop and the overlapped one: what the host adds to the device's time in a whole decoding step.

``python -m euryale.benchmarks.kernels.loop --model llama-7b --nodes 64`` decodes one request on random weights with
both loops, interleaved, and compares the time of a step with what its recorded kernels take alone. On a CPU the device
is the host's own cores, so that there is little to overlap.
"""

import argparse
import json
import statistics
import time

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

PROMPT = 32  # tokens


def decode(engine: Engine, loop: str, steps: int, key: int, plans: list[StepPlan] | None = None) -> float:
    """Median seconds of a decoding step of one request; the steps' plans are added to ``plans``."""
    engine.overlaps = loop == "overlapped"
    prompt = np.arange(1, PROMPT + 1, dtype=np.int32)
    params = SamplingParams(max_tokens=engine.scheduler.limits.max_model_len - PROMPT, ignore_eos=True)
    engine.scheduler.add(Request(key=key, prompt=prompt, params=params))
    engine.step()
    found, outputs = [], []
    for _ in range(steps):
        started = time.perf_counter()
        # What the server sends of a step is packed likewise.
        step = engine.step(lambda last=outputs: msgpack.packb([(o.key, o.tokens) for o in last]))
        outputs = step.outputs
        if plans is not None:
            plans.append(step.planned.plan)
        found.append(time.perf_counter() - started)
        if any(o.finish_reason for o in outputs):
            break
    engine.scheduler.cancel(key)
    return statistics.median(found)


def run(args: argparse.Namespace, group: Group) -> dict:
    """Both loops, and the device's part of a step."""
    tree = default_tree(4, args.nodes - 1) if args.nodes > 1 else None
    engine = make_engine(args.model, DTYPES[args.dtype], tree, args.max_len, group, device=group.device.type)
    found: dict[str, list[float]] = {"plain": [], "overlapped": []}
    plans: list[StepPlan] = []
    decode(engine, "plain", args.steps, -1)
    for key in range(args.rounds):
        for loop, seconds in found.items():
            seconds.append(decode(engine, loop, args.steps, 2 * key + (loop == "plain"), plans))
    report = {"machine": describe(), "model": args.model, "dtype": args.dtype, "nodes": args.nodes, "loops": {}}
    last = next(plan for plan in reversed(plans) if plan.num_rows == args.nodes)
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
    print(f"{report['machine']}\n{args.model}, {args.dtype}, {args.nodes} nodes, one request")
    print(f"the device's part of a step: {report['device_ms']} ms")
    for loop, row in report["loops"].items():
        print(f"{loop:<12}{row['ms']:>9.3f} ms a step, of which the host {100 * row['host_gap']:.1f} %")
    print(json.dumps(report))


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="llama-110m")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument(
        "--nodes", type=number(1, 128), default=16, help="nodes of the tree, its root included; 1: no speculation"
    )
    parser.add_argument("--max-len", type=number(2 * PROMPT), default=512, help="tokens of prompt and answer")
    parser.add_argument("--steps", type=number(1), default=60)
    parser.add_argument("--rounds", type=number(1), default=5)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
