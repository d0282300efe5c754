"""Plots of a ``--trace`` file: tokens per step, draft tokens by load, and predicted against measured step times.

``python -m euryale.benchmarks.plot_trace TRACE --out DIR`` draws the last run in the file as ``accepted.png``,
``budget.png`` and ``cost.png``; ``--run 0`` draws the first.
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

_BINS = 200  # points of a line


def column(steps: list[dict], name: str) -> np.ndarray:
    """Return a field of every step, float64; NaN where it is missing."""
    return np.array([step[name] for step in steps], dtype=np.float64)


def draw_accepted(steps: list[dict]) -> plt.Figure:
    """Plot the tokens per decoding request and step: measured and, where the budget predicts them, expected."""
    figure, axes = plt.subplots(figsize=(8, 4))
    steps = [step for step in steps if step["decoding"]]
    time, decoding = column(steps, "t"), column(steps, "decoding")
    expected = column(steps, "expected_accepted_tokens")
    parts = np.array_split(np.arange(len(steps)), min(_BINS, max(1, len(steps))))
    when = [time[part].mean() for part in parts if len(part)]
    accepted = [
        1 + column(steps, "num_accepted_tokens")[part].sum() / decoding[part].sum() for part in parts if len(part)
    ]
    axes.plot(when, accepted, color="#2b8a3e", label="accepted")
    is_speculative = ~np.isnan(expected)
    predicted = [
        1 + expected[part][is_speculative[part]].sum() / decoding[part][is_speculative[part]].sum()
        if is_speculative[part].any()
        else np.nan
        for part in parts
        if len(part)
    ]
    if is_speculative.any():
        axes.plot(when, predicted, color="#e67700", linewidth=1, label="expected, in steps with draft tokens")
    axes.set(xlabel="seconds since start", ylabel="tokens per request and step", ylim=(0.9, None))
    axes.legend()
    return figure


def draw_budget(steps: list[dict]) -> plt.Figure:
    """Plot the draft tokens of a step against its decoding requests."""
    figure, axes = plt.subplots(figsize=(8, 4))
    steps = [step for step in steps if step["decoding"]]
    load, num_draft_tokens = column(steps, "decoding"), column(steps, "num_draft_tokens")
    axes.scatter(load, num_draft_tokens, s=6, alpha=0.2, color="#3b5bdb", linewidths=0, label="steps")
    sizes = np.unique(load)
    axes.plot(sizes, [num_draft_tokens[load == n].mean() for n in sizes], color="#e67700", marker=".", label="mean")
    axes.set(xlabel="requests decoding", ylabel="draft tokens of the step", xscale="log")
    axes.legend()
    return figure


def draw_cost(steps: list[dict]) -> plt.Figure:
    """Plot predicted against measured milliseconds, with and without draft tokens."""
    figure, axes = plt.subplots(figsize=(5.5, 5.5))
    steps = [step for step in steps if step["predicted_seconds"] is not None]
    predicted, seconds = 1e3 * column(steps, "predicted_seconds"), 1e3 * column(steps, "seconds")
    is_speculative = column(steps, "num_draft_tokens") > 0
    for kind, color, label in (
        (~is_speculative, "#868e96", "without draft tokens"),
        (is_speculative, "#3b5bdb", "with draft tokens"),
    ):
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
        raise ValueError(f"{args.trace} holds {len(runs)} runs: give --run 0 to {len(runs) - 1}")
    steps = runs[args.run]
    if not any(step["decoding"] for step in steps):
        raise ValueError(f"this run of {args.trace} has no decoding step: give another --run")
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
    parser.add_argument("--out", type=Path, required=True, help="output directory")
    parser.add_argument("--run", type=int, default=-1, help="index of the run in the file, from 0 (default: the last)")
    return parser


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
