"""Draws one real decoding step as SVG: the draft tree, the model's tokens and the accepted path.

``python -m euryale.benchmarks.draw_step --model demo/model --out docs/tree-step.svg`` decodes a prompt and draws the
first step with the most accepted draft tokens.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from euryale.benchmarks import arguments
from euryale.frontend.tokenizer import load_tokenizer
from euryale.parallel.group import single
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams

COLUMN, ROW, BOX = 190, 34, 26  # pixels


@dataclass(frozen=True)
class Step:
    """A decoding step of one request.

    ``tokens`` and ``parents`` of the tree nodes, root first; the ``accepted`` nodes, the ``bonus`` token, and the
    tokens ``before`` the step.
    """

    tokens: list[int]
    parents: list[int]
    accepted: list[int]
    bonus: int
    before: list[int]


def best_step(engine: Engine, prompt: list[int], max_tokens: int) -> Step:
    """Decode the prompt and return the step with the longest accepted path. ValueError if no step had draft tokens."""
    request = Request(key=0, prompt=np.asarray(prompt, dtype=np.int32), params=SamplingParams(max_tokens=max_tokens))
    scheduler = engine.scheduler
    assert scheduler is not None, "this rank is the leader"
    scheduler.add(request)
    best: Step | None = None
    while scheduler.has_work:
        before = prompt + request.output
        planned = scheduler.plan(engine.epoch, engine.runner.digest)
        results = engine.runner.run(planned.plan)
        scheduler.advance(planned, results)
        segment, path = planned.plan.segments[0], results[0].accepted_nodes if results else []
        if segment.num_draft_tokens and (best is None or len(path) > len(best.accepted)):
            tree = segment.tokens[segment.num_new_tokens - 1 :].tolist()
            best = Step(tree, [-1, *segment.parents.tolist()], path, results[0].tokens[-1], before)
    if best is None:
        raise ValueError("no step had draft tokens: give --medusa, or another --prompt")
    return best


def draw(step: Step, show: Callable[[list[int]], str]) -> str:
    """Return the step as SVG; ``show`` turns token ids into text."""
    depths = [0]
    for parent in step.parents[1:]:
        depths.append(depths[parent] + 1)
    children = {n: [c for c, p in enumerate(step.parents) if p == n] for n in range(len(depths))}
    y: dict[int, float] = {}

    def place(node: int, row: float) -> float:
        """Lay out a subtree from ``row`` on; returns the first free row below it."""
        below = row
        for child in children[node]:
            below = place(child, below)
        y[node] = row if not children[node] else (y[children[node][0]] + y[children[node][-1]]) / 2
        return max(below, row + 1)

    height = place(0, 0) * ROW + 90
    end = step.accepted[-1] if step.accepted else 0
    width, path = (max(depths) + 2) * COLUMN + 20, {0, *step.accepted}

    def at(node: int) -> tuple[float, float]:
        return 20 + depths[node] * COLUMN, 60 + y[node] * ROW

    def box(x: float, top: float, text: str, style: str) -> str:
        rect = f'<rect x="{x}" y="{top}" width="{COLUMN - 50}" height="{BOX}" rx="6" class="{style}"/>'
        return rect + f'<text x="{x + 10}" y="{top + 18}" class="{style}-text">{escape(text)}</text>'

    lines: list[str] = []
    boxes: list[str] = []
    for node in range(len(depths)):
        x, top = at(node)
        if node:
            px, py = at(step.parents[node])
            kind = "on" if node in path else "off"
            x1, y1, y2 = px + COLUMN - 50, py + BOX / 2, top + BOX / 2
            middle = (x1 + x) / 2
            lines.append(f'<path d="M{x1} {y1} C{middle} {y1} {middle} {y2} {x} {y2}" class="{kind}"/>')
        style = "root" if node == 0 else ("hit" if node in path else "miss")
        boxes.append(box(x, top, show([step.tokens[node]]), style))
    x, top = at(end)
    lines.append(f'<path d="M{x + COLUMN - 50} {top + BOX / 2} L{x + COLUMN} {top + BOX / 2}" class="bonus-line"/>')
    boxes.append(box(x + COLUMN, top, show([step.bonus]), "bonus"))
    title = (
        f"one step: {len(depths)} rows in one forward pass, {len(step.accepted)} draft tokens accepted + 1 bonus token"
    )
    context = show(step.before[-12:])
    frame = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    return f"""<svg {frame} font-family="monospace" font-size="14">
<style>rect{{stroke-width:1.5}} .root{{fill:#dbe4ff;stroke:#3b5bdb}} .hit{{fill:#d3f9d8;stroke:#2b8a3e}}
.miss{{fill:#f1f3f5;stroke:#adb5bd}} .miss-text{{fill:#868e96}} .bonus{{fill:#fff3bf;stroke:#e67700}}
path{{fill:none}} .on{{stroke:#2b8a3e;stroke-width:3}} .off{{stroke:#ced4da;stroke-width:1.5}}
.bonus-line{{stroke:#e67700;stroke-width:3;stroke-dasharray:5 4}}</style>
<rect width="{width}" height="{height}" fill="#ffffff"/>
<text x="20" y="24" font-weight="bold">{title}</text>
<text x="20" y="46" fill="#868e96">... {escape(context)}</text>
{chr(10).join(lines + boxes)}
</svg>
"""


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--medusa", default="")
    parser.add_argument("--prompt", default="def read_lines(path):\n")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def main(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.model)
    engine = Engine(EngineConfig(model=args.model, medusa=args.medusa, dtype="float32", max_num_seqs=1), single())
    step = best_step(engine, tokenizer.encode(args.prompt), 64)
    args.out.write_text(draw(step, lambda ids: tokenizer.decode(ids).replace("\n", "⏎").replace(" ", "·")))


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
