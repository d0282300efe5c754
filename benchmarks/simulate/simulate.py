"""Simulation of the real scheduler on H200-class GPUs, for many users and several speculation policies.

``python -m euryale.benchmarks.simulate.simulate --machine 7b --accuracy vicuna_head_accuracy.csv --users 1 8 64 512``
compares plain decoding, a static tree, a chain and dynamic trees. Every user sends the next request when the last one
is answered. ``--rates 4 16 --burst 8`` has requests arrive at these rates per second, in bursts. ``--recorded FILE``
takes recorded heads instead of published accuracies. ``machine.py`` and ``heads.py`` describe the models.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from euryale.benchmarks import arguments
from euryale.benchmarks.arguments import number
from euryale.benchmarks.published_tree import accuracies
from euryale.benchmarks.simulate.heads import Answers, DrawnAnswers, RecordedAnswers, extrapolate_ranks
from euryale.benchmarks.simulate.machine import MACHINES
from euryale.benchmarks.simulate.simulation import Load, Setting, Simulation
from euryale.scheduler import trace
from euryale.scheduler.speculation.dynamic_drafter import Sources
from euryale.scheduler.speculation.tree import TreeShape, chain, default_tree, load_tree, search_tree

POLICIES = ("plain", "static", "chain", "dynamic")
HEADS_OF = {"7b": "7b", "70b": "33b"}  # rows of the accuracies; there are none for 70B
PROMPTS, LENGTHS = range(64, 257), range(128, 385)
MIN_REQUESTS, REQUESTS_PER_USER = 200, 2  # of a run
_COLUMNS = [
    "load",
    "policy",
    "tokens/s",
    "x plain",
    "tokens/step",
    "TTFT p50, p99 ms",
    "TPOT p50, p99 ms",
    "ITL p99 ms",
    "goodput",
]


def measures(simulation: Simulation, ttft: float, tpot: float) -> dict:
    """Return the results of a run; ``ttft`` and ``tpot``: limits of goodput, seconds.

    Throughput excludes ramp-up and ramp-down: it is measured from a tenth of the time until the last arrival.
    """
    timings = list(simulation.timings.values())
    first = np.array([t.ttft for t in timings])
    each = np.array([t.tpot for t in timings])
    between = np.concatenate([np.diff(t.deliveries) for t in timings])
    ends, tokens = np.array(simulation.ends), np.array(simulation.tokens)
    stop = max(simulation.issued[-1], 0.5 * ends[-1])
    start = 0.1 * stop
    inside = (ends > start) & (ends <= stop)
    admission = simulation.scheduler.admission
    return {
        "tokens_per_second": round(float(tokens[inside].sum() / (stop - start)), 1),
        "tokens_per_delivery": round(sum(t.tokens for t in timings) / sum(len(t.deliveries) for t in timings), 3),
        "ttft_ms": [round(1e3 * float(x), 1) for x in np.percentile(first, (50, 99))],
        "tpot_ms": [round(1e3 * float(x), 2) for x in np.percentile(each, (50, 99))],
        "itl_p99_ms": round(1e3 * float(np.percentile(between, 99)), 2),
        "goodput": round(float(np.mean((first <= ttft) & (each <= tpot))), 3),
        "steps": len(ends),
        "preempted": admission.num_preempted_for_pages,
        "host_us": round(1e6 * float(np.median(simulation.host_seconds)), 1),
    }


def answers_of(args: argparse.Namespace) -> Answers:
    """Return the answers of --recorded or --accuracy. ValueError if both are missing."""
    if args.recorded:
        return RecordedAnswers(args.recorded)
    if args.accuracy is None:
        raise ValueError("the heads are missing: give --accuracy FILE.csv or --recorded FILE.npz")
    found = accuracies(args.accuracy)
    name = HEADS_OF[args.machine]
    if name not in found:
        raise ValueError(f"{args.accuracy} has no row {name!r}: give another --accuracy or --machine")
    return DrawnAnswers(found[name], PROMPTS, LENGTHS, args.seed)


def static_tree(args: argparse.Namespace, answers: Answers) -> TreeShape:
    """Return the tree of --tree; else 63 draft tokens, searched for drawn heads, generic for recorded ones."""
    if args.tree:
        return load_tree(args.tree, answers.num_heads)
    if isinstance(answers, DrawnAnswers):
        return search_tree(extrapolate_ranks(answers.accuracy_KR), 63)
    return default_tree(answers.num_heads, 63)


def settings_of(args: argparse.Namespace, answers: Answers, count: int) -> dict[str, Setting]:
    """Return the setting of every policy."""
    sources = Sources(text=False, traffic=False, context=False)
    if isinstance(answers, RecordedAnswers):  # traffic would know a repeated answer
        sources = Sources(text=False, traffic=count <= len(answers), context=True)
    trees: dict[str, TreeShape | str | None] = {
        "plain": None,
        "static": static_tree(args, answers),
        "chain": chain(answers.num_heads),
        "dynamic": "dynamic",
    }
    machine = MACHINES[args.machine]
    if not args.host:
        machine = dataclasses.replace(
            machine,
            host=0.0,
            host_per_request=0.0,
            host_per_draft_token=0.0,
            host_drafting=0.0,
            host_drafting_per_request=0.0,
        )
    return {
        name: Setting(machine=machine, answers=answers, tree=trees[name], seed=args.seed, sources=sources)
        for name in args.policies
    }


def run(args: argparse.Namespace) -> dict:
    """Run all policies at all loads; prints the table's rows meanwhile."""
    answers = answers_of(args)
    loads = {f"{n} users": Load(max(args.requests or MIN_REQUESTS, REQUESTS_PER_USER * n), users=n) for n in args.users}
    loads |= {f"{r:g}/s": Load(args.requests or MIN_REQUESTS, rate=r, burst=args.burst) for r in args.rates}
    if not loads:
        raise ValueError("the load is missing: give --users N ... or --rates R ...")
    report: dict = {"machine": args.machine, "seed": args.seed, "host": args.host, "loads": {}}
    print(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}")
    for name, load in loads.items():
        rows = report["loads"][name] = {}
        for policy, setting in settings_of(args, answers, load.count).items():
            simulation = Simulation(setting, load, keeps_trace=args.trace is not None).run()
            rows[policy] = row = measures(simulation, args.ttft / 1000, args.tpot / 1000)
            plain = rows.get("plain", {}).get("tokens_per_second")
            row["of_plain"] = round(row["tokens_per_second"] / plain, 3) if plain else None
            print(_line(name, policy, row), flush=True)
            if args.trace:
                _write_trace(args.trace, simulation, f"{args.machine} {name} {policy}")
    return report


def _line(load: str, policy: str, row: dict) -> str:
    cells = [
        load,
        policy,
        f"{row['tokens_per_second']:,.0f}",
        f"{row['of_plain']:.2f}" if row["of_plain"] else "",
        f"{row['tokens_per_delivery']:.2f}",
    ]
    cells += [
        f"{row['ttft_ms'][0]:,.0f}, {row['ttft_ms'][1]:,.0f}",
        f"{row['tpot_ms'][0]:.1f}, {row['tpot_ms'][1]:.1f}",
    ]
    return "| " + " | ".join([*cells, f"{row['itl_p99_ms']:.1f}", f"{100 * row['goodput']:.0f} %"]) + " |"


def _write_trace(path: Path, simulation: Simulation, name: str) -> None:
    """Append the trace in the format of a server's ``--trace``."""
    assert simulation.trace is not None, "the simulation keeps its trace"
    with path.open("a", encoding="utf-8") as file:
        for row in ({"trace": trace.VERSION, "simulated": name}, *simulation.trace):
            file.write(json.dumps(row) + "\n")


def draw(report: dict, out: Path) -> None:
    """Plot throughput and time per output token against users, as ``simulated-MACHINE.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    loads = {int(name.split()[0]): rows for name, rows in report["loads"].items() if name.endswith("users")}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for policy in next(iter(loads.values())):
        axes[0].plot(list(loads), [r[policy]["tokens_per_second"] for r in loads.values()], marker=".", label=policy)
        axes[1].plot(list(loads), [r[policy]["tpot_ms"][0] for r in loads.values()], marker=".", label=policy)
    for plot, label in zip(axes, ("tokens/s, all users", "median ms per output token"), strict=True):
        plot.set(xlabel="users", ylabel=label, xscale="log", yscale="log")
        plot.set_xticks(list(loads), map(str, loads))
        plot.minorticks_off()
        plot.grid(alpha=0.3)
        plot.legend()
    figure.suptitle(f"simulated: {report['machine']}")
    figure.tight_layout()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"simulated-{report['machine']}.png", dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    report = run(args)
    if args.out and args.users:
        draw(report, args.out)
    print(json.dumps(report))


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", choices=MACHINES, default="7b", help="model: 7B on one GPU or 70B on eight")
    parser.add_argument("--accuracy", type=Path, help="CSV of published accuracies by head and rank")
    parser.add_argument("--recorded", type=Path, help="recording by euryale.benchmarks.simulate.record_heads")
    parser.add_argument("--tree", help="JSON of the static tree (default: one of 63 draft tokens)")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--users", nargs="+", type=number(1, 1024), default=[])
    parser.add_argument("--rates", nargs="+", type=float, default=[], help="requests per second")
    parser.add_argument("--burst", type=float, default=1.0, help="mean number of simultaneous arrivals (--rates)")
    parser.add_argument("--requests", type=number(1), help="minimum requests per run (default: 200, and 2 per user)")
    parser.add_argument("--ttft", type=float, default=500.0, help="milliseconds to the first token, limit of goodput")
    parser.add_argument("--tpot", type=float, default=20.0, help="milliseconds per further token, limit of goodput")
    parser.add_argument(
        "--host", action=argparse.BooleanOptionalAction, default=True, help="include the scheduler's time"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, help="append all steps to this file, for plot_trace")
    parser.add_argument("--out", type=Path, help="output directory of the plot")
    return parser


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
