"""Time of every kernel compared with the machine's limits, and with PyTorch's functions for the same work.

``python -m euryale.benchmarks.kernels.operations`` measures attention by context and tree size, and the small
operations. The limits are measured in the same run: memory by reading, arithmetic by a large matrix product. A case's
fraction of the limit is its least possible time over its time; the former is the longer of memory traffic and
arithmetic. Calls rotate over copies of the data that together exceed the caches. ``--flex`` adds compiled
FlexAttention, which takes up to a minute per shape to compile on a CPU.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from euryale.benchmarks import arguments
from euryale.benchmarks.arguments import number
from euryale.benchmarks.kernels import flex
from euryale.benchmarks.machine import best, describe, read_bandwidth
from euryale.kernels import backend
from euryale.kernels.add_rms_norm import add_rms_norm
from euryale.kernels.commit import commit
from euryale.kernels.linear import FrozenLinear
from euryale.kernels.linear.quantize import quantize
from euryale.kernels.sample import sample
from euryale.kernels.silu_mul import silu_mul
from euryale.kernels.step_metadata import SegmentShape, StepMetadata
from euryale.kernels.top_k import top_k
from euryale.kernels.tree_attention import tree_attention
from euryale.runtime.model.config import DTYPES

PAGE = 16
CACHES = 96 << 20  # bytes, more than the caches hold


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel and one shape.

    ``runs``: name -> function of a copy's index. ``num_bytes`` and ``flops``: work of a call.
    """

    name: str
    runs: dict[str, Callable[[int], object]]
    copies: int
    num_bytes: int
    flops: int


def copies_of(num_bytes: int) -> int:
    """Return the number of copies of ``num_bytes`` that exceed the caches, at most 64."""
    return min(64, -(-CACHES // max(num_bytes, 1)))


def attention_case(
    context: int,
    rows: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    with_flex: bool,
) -> Case:
    """Return one request's tree attention; the alternative gathers the pages and calls SDPA with a dense mask."""
    pages = -(-(context + rows) // PAGE)
    parents = np.asarray([max(0, (node - 1) // 2) for node in range(1, rows)], dtype=np.int32)
    shuffled = np.random.default_rng(0).permutation(pages).astype(np.int32)
    segment = SegmentShape(num_new_tokens=1, context=context, parents=parents, pages=shuffled)
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    num_bytes = 2 * context * kv_heads * dim * dtype.itemsize
    caches = [torch.randn(2, pages, kv_heads, PAGE, dim, **kind) for _ in range(copies_of(num_bytes))]
    q, scratch = torch.randn(rows, heads, dim, **kind), torch.randn(2, rows, kv_heads, dim, **kind)
    ours, theirs = (StepMetadata.build([segment], PAGE, device) for _ in range(2))

    def reference(copy: int) -> torch.Tensor:
        with backend.forced("reference"):
            return tree_attention(q, scratch, caches[copy], theirs, dim**-0.5)

    name = f"attention {heads}/{kv_heads}x{dim}, context {context}, {rows} rows"
    runs: dict[str, Callable[[int], object]] = {
        "ours": lambda copy: tree_attention(q, scratch, caches[copy], ours, dim**-0.5),
        "gather + SDPA": reference,
        # A lower bound of every implementation.
        "reading the keys and values": lambda copy: caches[copy].view(torch.int32).sum(dtype=torch.int32),
    }
    if with_flex:
        run, note = flex.compiled(segment, q, scratch, caches, dim**-0.5)
        print(f"{name}: FlexAttention {note}", flush=True)
        if run:
            runs["gather + FlexAttention"] = run
    return Case(
        name=name,
        runs=runs,
        copies=len(caches),
        num_bytes=num_bytes,
        flops=4 * rows * heads * dim * (context + rows),
    )


def linear_case(rows: int, out: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Return a matrix product; the alternatives are PyTorch's, and ours with quantized weights."""
    num_bytes = out * width * dtype.itemsize
    weights = [torch.randn(out, width, dtype=dtype, device=device) for _ in range(copies_of(num_bytes))]
    ours = [FrozenLinear(weight) for weight in weights]
    x = torch.randn(rows, width, dtype=dtype, device=device)

    def run(layers: list[FrozenLinear], copy: int) -> torch.Tensor:
        return layers[copy](x)

    runs: dict[str, Callable[[int], object]] = {"ours": partial(run, ours)}
    runs["F.linear"] = lambda copy: F.linear(x, weights[copy])
    if device.type == "cpu" or dtype == torch.bfloat16:  # the condition of `quantize.check`
        for kind in ("int8", "int4"):
            small = [FrozenLinear(quantize(weight, kind)) for weight in weights]
            runs[kind] = partial(run, small)
    name = f"linear {out}x{width}, {rows} rows"
    return Case(name=name, runs=runs, copies=len(weights), num_bytes=num_bytes, flops=2 * rows * out * width)


def small_cases(dtype: torch.dtype, device: torch.device) -> list[Case]:
    """Return the operations between the matrix products, with 8 rows of a hidden size of 768."""
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    x, residual, weight = torch.randn(8, 768, **kind), torch.randn(8, 768, **kind), torch.ones(768, **kind)
    gate_up, logits = torch.randn(8, 4096, **kind), torch.randn(8, 32000, device=device)
    cache, scratch = torch.zeros(12, 2, 64, 12, PAGE, 64, **kind), torch.randn(12, 2, 16, 12, 64, **kind)
    slots = torch.tensor([7, -1, 8, -1, -1, 9], device=device)

    def case(name: str, num_bytes: int, run: Callable[[], object]) -> Case:
        def forced(_copy: int) -> object:
            with backend.forced("reference"):
                return run()

        runs: dict[str, Callable[[int], object]] = {"ours": lambda _copy: run(), "reference": forced}
        return Case(name=name, runs=runs, copies=1, num_bytes=num_bytes, flops=0)

    norm = lambda: add_rms_norm(x, residual, weight, 1e-5)  # noqa: E731
    gate, top = lambda: silu_mul(gate_up), lambda: top_k(logits, 8)
    move = lambda: commit(cache, scratch, slots)  # noqa: E731
    temperature, keys = torch.ones(8, device=device), torch.arange(8, device=device)
    sample_logits = lambda: sample(logits, temperature, keys, 32000, 0)  # noqa: E731
    moved = 2 * 3 * 12 * 2 * 12 * 64 * dtype.itemsize
    return [
        case("add_rms_norm 8x768", 3 * x.nbytes, norm),
        case("silu_mul 8x2048", gate_up.nbytes, gate),
        case("top_k 8 of 8x32000", logits.nbytes, top),
        case("sample from 8x32000", logits.nbytes, sample_logits),
        case("commit 3 rows, 12 layers", moved, move),
    ]


def measure(case: Case, rounds: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of a call, the alternatives interleaved."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found: dict[str, list[float]] = {name: [] for name in case.runs}
    copies = itertools.cycle(range(case.copies))
    for _ in range(rounds):
        for name, run in case.runs.items():
            run(next(copies))
            wait()
            calls, started = [next(copies) for _ in range(5)], time.perf_counter()
            for copy in calls:
                run(copy)
            wait()
            found[name].append((time.perf_counter() - started) / len(calls))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, dtype=dtype, device=device), torch.randn(n, n, dtype=dtype, device=device)

    def multiply() -> None:
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()

    multiply()
    return 2 * n**3 / best(multiply)


def main(args: argparse.Namespace) -> None:
    if args.heads[0] % args.heads[1]:
        raise ValueError(f"--heads {args.heads[0]} {args.heads[1]}: the KV heads must divide the query heads")
    dtype, device = DTYPES[args.dtype], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth, rate = read_bandwidth(device), product_rate(dtype, device)
    report: dict[str, Any] = {
        "machine": describe(),
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "cases": {},
    }
    report |= {"read_GBps": round(bandwidth / 1e9, 1), "product_GFLOPps": round(rate / 1e9)}
    print(f"{report['machine']}, {args.dtype}, {report['threads']} threads")
    print(f"reads {report['read_GBps']} GB/s, products {report['product_GFLOPps']} GFLOP/s")
    print(f"{'case':<46}{'us':>10}{'GB/s':>8}{'GFLOP/s':>9}{'of limit':>9}  alternatives")
    shapes = itertools.product(args.contexts, args.rows)
    heads, kv_heads = args.heads
    cases = (attention_case(c, n, heads, kv_heads, args.head_dim, dtype, device, args.flex) for c, n in shapes)
    products = itertools.product((1, 8, 32), ((512, 256), (2304, 768), (4096, 4096)))
    linear_cases = (linear_case(rows, *shape, dtype, device) for rows, shape in products)
    with torch.inference_mode():
        for case in itertools.chain(cases, linear_cases, small_cases(dtype, device)):
            seconds = measure(case, args.rounds, device)
            ours = seconds.pop("ours")
            least = max(case.num_bytes / bandwidth, case.flops / rate)
            beside = {name: round(other / ours, 2) for name, other in seconds.items()}
            row = {"us": round(ours * 1e6, 1), "of_limit": round(least / ours, 3), "times_ours": beside}
            report["cases"][case.name] = row
            speeds = f"{case.num_bytes / ours / 1e9:>8.1f}{case.flops / ours / 1e9:>9.0f}{least / ours:>9.2f}"
            others = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in beside.items())
            print(f"{case.name:<46}{ours * 1e6:>10.1f}{speeds}  {others}", flush=True)
    print(json.dumps(report))


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--head-dim", type=number(1), default=64)
    parser.add_argument("--heads", type=number(1), nargs=2, default=[8, 2], help="query heads and KV heads")
    parser.add_argument("--contexts", type=number(1), nargs="+", default=[128, 1000, 4000, 16000])
    parser.add_argument("--rows", type=number(1, 128), nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=number(1), default=15)
    parser.add_argument(
        "--flex",
        action="store_true",
        default=torch.cuda.is_available(),
        help="measure FlexAttention too; default on a GPU",
    )
    return parser


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
