"""Pictures of a trace that ``--trace`` wrote: how many tokens steps brought, what the budget did, what steps cost.

``python -m euryale.benchmarks.plot_trace TRACE --out DIR`` draws the last run in the file as ``accepted.png``,
``budget.png`` and ``cost.png``; ``--run 0`` the first one.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

from euryale.benchmarks import arguments
from euryale.scheduler import trace

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_BINS = 200  # points of a line over time


def column(steps: list[dict], name: str) -> np.ndarray:
    """A number of each step, float64; NaN where there is none."""
    return np.array([step[name] for step in steps], dtype=np.float64)


def draw_accepted(steps: list[dict]) -> plt.Figure:
    """Tokens that a decoding request got from a step: measured and, where a budget says so, expected."""
    figure, axes = plt.subplots(figsize=(8, 4))
    steps = [step for step in steps if step["decoding"]]
    time, decoding = column(steps, "t"), column(steps, "decoding")
    expected = column(steps, "expected_accepted_tokens")
    parts = np.array_split(np.arange(len(steps)), min(_BINS, max(1, len(steps))))
    when = [time[part].mean() for part in parts if len(part)]
    found = [1 + column(steps, "num_accepted_tokens")[part].sum() / decoding[part].sum() for part in parts if len(part)]
    axes.plot(when, found, color="#2b8a3e", label="accepted")
    guessing = ~np.isnan(expected)
    said = [
        1 + expected[part][guessing[part]].sum() / decoding[part][guessing[part]].sum()
        if guessing[part].any()
        else np.nan
        for part in parts
        if len(part)
    ]
    if guessing.any():
        axes.plot(when, said, color="#e67700", linewidth=1, label="expected, in steps with guesses")
    axes.set(xlabel="seconds since start", ylabel="tokens per request and step", ylim=(0.9, None))
    axes.legend()
    return figure


def draw_budget(steps: list[dict]) -> plt.Figure:
    """Guesses of a step by the requests that decoded in it."""
    figure, axes = plt.subplots(figsize=(8, 4))
    steps = [step for step in steps if step["decoding"]]
    load, chosen = column(steps, "decoding"), column(steps, "num_draft_tokens")
    axes.scatter(load, chosen, s=6, alpha=0.2, color="#3b5bdb", linewidths=0, label="steps")
    sizes = np.unique(load)
    axes.plot(sizes, [chosen[load == n].mean() for n in sizes], color="#e67700", marker=".", label="mean")
    axes.set(xlabel="requests decoding", ylabel="guesses of the step", xscale="log")
    axes.legend()
    return figure


def draw_cost(steps: list[dict]) -> plt.Figure:
    """Predicted against measured milliseconds, with guesses and without."""
    figure, axes = plt.subplots(figsize=(5.5, 5.5))
    steps = [step for step in steps if step["predicted_seconds"] is not None]
    predicted, seconds = 1e3 * column(steps, "predicted_seconds"), 1e3 * column(steps, "seconds")
    guessing = column(steps, "num_draft_tokens") > 0
    for kind, color, label in ((~guessing, "#868e96", "no guesses"), (guessing, "#3b5bdb", "guesses")):
        axes.scatter(predicted[kind], seconds[kind], s=6, alpha=0.3, color=color, linewidths=0, label=label)
    if len(steps):
        ends = [min(predicted.min(), seconds.min()), max(predicted.max(), seconds.max())]
        axes.plot(ends, ends, color="#e67700", linewidth=1)
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel="predicted ms", ylabel="measured ms")
    axes.legend()
    return figure


def main(args: argparse.Namespace) -> None:
    runs = list(trace.read(args.trace))
    if not -len(runs) <= args.run < len(runs):
        raise ValueError(f"{args.trace} holds {len(runs)} runs, the first is --run 0")
    steps = runs[args.run]
    if not any(step["decoding"] for step in steps):
        raise ValueError(f"this run of {args.trace} has no decoding step: nothing to draw")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("accepted", draw_accepted), ("budget", draw_budget), ("cost", draw_cost)):
        figure = draw(steps)
        figure.tight_layout()
        figure.savefig(args.out / f"{name}.png", dpi=120)
        plt.close(figure)
    print(json.dumps({"runs": len(runs), "steps": len(steps)}))


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="directory of the pictures")
    parser.add_argument("--run", type=int, default=-1, help="which run in the file, from 0 (default: the last)")
    return parser


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
