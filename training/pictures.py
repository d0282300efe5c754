"""Plots of losses, head accuracies and trees (matplotlib, without a display)."""

from pathlib import Path
from typing import Any

import numpy as np

from euryale.training.backbone import import_library


def check() -> None:
    """Import matplotlib before a long training starts. ValueError if it is missing."""
    import_library("matplotlib.pyplot")


def _axes(width: float, height: float) -> tuple[Any, Any]:
    import_library("matplotlib").use("Agg")
    return import_library("matplotlib.pyplot").subplots(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    import_library("matplotlib.pyplot").close(figure)


def draw_losses(path: Path, rows: list[dict], num_heads: int) -> None:
    """Plot losses by step from the rows of a Journal: lines in training, dots on held-out text."""
    figure, axes = _axes(8, 4.5)
    for number, name in enumerate(["backbone_loss", *(f"loss_{k}" for k in range(num_heads))]):
        label = "backbone" if number == 0 else f"head {number - 1}"
        points = {
            kind: [(int(r["step"]), float(r[name])) for r in rows if r["kind"] == kind]
            for kind in ("train", "held-out")
        }
        lines = [(s, y) for s, y in points["train"] if y > 0]  # a frozen backbone has no loss in training
        if lines:
            steps, values = zip(*lines, strict=True)
            width = max(1, len(values) // 100)
            smooth = np.convolve(np.pad(values, (width - 1, 0), mode="edge"), np.ones(width) / width, mode="valid")
            axes.plot(steps, smooth, color=f"C{number}", linewidth=1)
        if points["held-out"]:
            axes.plot(*zip(*points["held-out"], strict=True), "o--", color=f"C{number}", markersize=4, label=label)
    axes.set(xlabel="step", ylabel="nats per token", title="lines: training, dots: held out")
    axes.legend()
    _save(figure, path)


def draw_accuracy(path: Path, accuracy_KR: np.ndarray) -> None:
    """Plot how often the target has each rank at each head, one stacked bar per head."""
    figure, axes = _axes(7, 4)
    below = np.zeros(len(accuracy_KR))
    for rank in range(accuracy_KR.shape[1]):
        shade = 0.25 + 0.7 * rank / accuracy_KR.shape[1]
        axes.bar(range(len(below)), accuracy_KR[:, rank], bottom=below, color=str(shade), label=f"rank {rank}")
        below += accuracy_KR[:, rank]
    heads = [f"head {k}\n(token t+{k + 2})" for k in range(len(below))]
    axes.set_xticks(range(len(below)), heads)
    axes.set(ylim=(0, 1), ylabel="fraction of positions", title="rank of the target among the head candidates")
    axes.legend(fontsize=7, ncols=2)
    _save(figure, path)


def draw_tree(path: Path, paths: list[list[int]], acceptance_probability: list[float]) -> None:
    """Draw a tree whose draft tokens are coloured by acceptance probability and labelled with their rank."""
    places: dict[tuple[int, ...], tuple[float, int]] = {}
    nodes: dict[tuple[int, ...], float] = {(): 1.0}
    nodes |= {tuple(p): s for p, s in zip(paths, acceptance_probability, strict=True)}
    leaves = 0

    def place(node: tuple[int, ...]) -> float:
        nonlocal leaves
        children = sorted(n for n in nodes if len(n) == len(node) + 1 and n[: len(node)] == node)
        if not children:
            leaves += 1
        x = float(leaves) if not children else float(np.mean([place(child) for child in children]))
        places[node] = (x, -len(node))
        return x

    place(())
    depth = max(map(len, nodes))
    figure, axes = _axes(max(5.0, 0.42 * leaves + 1.5), 1.3 * depth + 1.2)
    for node, (x, y) in places.items():
        if node:
            axes.plot([places[node[:-1]][0], x], [y + 1, y], color="0.7", zorder=1, linewidth=1)
        axes.annotate(str(node[-1]) if node else "root", (x, y - 0.28), ha="center", fontsize=7)
    xs, ys = zip(*(places[n] for n in nodes), strict=True)
    dots = axes.scatter(
        xs, ys, c=list(nodes.values()), cmap="viridis_r", vmin=0, vmax=1, s=90, zorder=2, edgecolors="0.3"
    )
    figure.colorbar(dots, ax=axes, label="acceptance probability")
    axes.set(ylim=(-depth - 0.6, 0.4), title=f"{len(paths)} draft tokens, labelled with their rank")
    axes.axis("off")
    _save(figure, path)
