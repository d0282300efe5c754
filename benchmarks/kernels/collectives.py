"""All-reduce over shared memory and over gloo, by size, interleaved in one run.

``torchrun --nproc-per-node 4 -m euryale.benchmarks.kernels.collectives`` reports the smallest of the rounds' medians,
because other work on the machine only adds time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from euryale.benchmarks.machine import describe
from euryale.parallel.group import join
from euryale.parallel.torch_collectives import TorchCollectives

SIZES = {"2 KiB": 512, "32 KiB": 8192, "1 MiB": 1 << 18}


def seconds(function: Callable[[torch.Tensor], object], x: torch.Tensor, calls: int) -> float:
    """Return the median seconds of a call."""
    found = []
    for _ in range(calls):
        started = time.perf_counter()
        function(x)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=100)
    args = parser.parse_args()
    group = join(device="cpu")
    if group.collectives is None or isinstance(group.collectives, TorchCollectives):
        raise SystemExit("start this with torchrun and several ranks on one host, with the CPU kernels built")
    shared, gloo = group.collectives, TorchCollectives(group.size, group.device)
    report: dict[str, Any] = {"machine": describe(), "ranks": group.size, "all_reduce": {}}
    for name, count in SIZES.items():
        x = torch.ones(count)
        rounds = []
        for _ in range(args.rounds):
            few = max(5, args.calls // 10)
            rounds.append((seconds(shared.all_reduce, x, args.calls), seconds(gloo.all_reduce, x, few)))
        ours, theirs = (min(column) for column in zip(*rounds, strict=True))
        report["all_reduce"][name] = {"us": round(ours * 1e6, 1), "gloo_us": round(theirs * 1e6, 1)}
        if group.is_leader:
            times = f"{ours * 1e6:9.1f} us, gloo {theirs * 1e6:9.1f} us, {theirs / ours:.1f}x"
            print(f"{group.size} ranks, {name:>7}: {times}")
    if group.is_leader:
        print(json.dumps(report))
    group.close()


if __name__ == "__main__":
    main()
