"""What happens when the workload changes: dynamic trees calibrated for one kind of text, served another.

``python -m euryale.benchmarks.shift --model DIR --first code.npz --second gsm8k.npz --text FILE`` replays recorded
answers (``record_heads.py``) with the real drafter. One drafter begins with what lies beside the heads and serves
the first recording, then half of the second. Others meet that half with a fresh calibration: n-grams of ``--text``,
which is like the second recording, and estimates learned from its other half. Reported is, for one stretch of served
tokens after the other, what share of the freshly calibrated one's tokens per step the others reach.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from euryale.benchmarks import arguments
from euryale.benchmarks.arguments import number
from euryale.benchmarks.simulate.heads import RecordedAnswers
from euryale.frontend.tokenizer import load_tokenizer
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.speculation.acceptance_stats import AcceptanceStats
from euryale.scheduler.speculation.dynamic_drafter import DynamicDrafter
from euryale.scheduler.speculation.ngram_table import NgramTable
from euryale.training.replay import Recorded, replay


def load(path: Path) -> list[Recorded]:
    """The answers of a recording."""
    answers = RecordedAnswers(path)
    made = [answers.make(key) for key in range(len(answers))]
    return [Recorded(a.prompt, a.truth, a.ids[1:], a.logits[1:]) for a in made]


def count_ngrams(args: argparse.Namespace) -> NgramTable:
    """Of the strings of a JSONL file's lines, each line a document."""
    tokenizer = load_tokenizer(args.model)
    with args.text.open(encoding="utf-8") as file:
        lines = ["\n".join(v for v in json.loads(line).values() if isinstance(v, str)) for line in file]
    return NgramTable.of_text([np.asarray(tokenizer.encode(line), dtype=np.int32) for line in lines])


def stretches(recorded: list[Recorded], edges: list[int]) -> list[list[Recorded]]:
    """The answers in parts that begin where at least so many tokens were served."""
    parts, served = [[] for _ in edges], 0
    for record in recorded:
        parts[sum(served >= edge for edge in edges) - 1].append(record)
        served += len(record.answer)
    if not all(parts):
        raise ValueError(f"the second recording is too short for stretches from {edges} tokens on: record more prompts")
    return parts


def measure(args: argparse.Namespace) -> tuple[list[list[Recorded]], dict[str, list[float]]]:
    """The stretches, and for each drafter its tokens per step in them."""
    first, second = load(args.first), load(args.second)
    measured, learned, num_heads = second[::2], second[1::2], second[0].ids_PKR.shape[1]
    params, heads = SamplingParams(temperature=args.temperature), Path(args.medusa or args.model)
    vocab_size = RecordedAnswers(args.first).vocab_size
    new_text = count_ngrams(args)
    begun = json.loads((heads / "calibration.json").read_text())["acceptance_stats"]

    def make(text: NgramTable, acceptance_stats: AcceptanceStats) -> DynamicDrafter:
        return DynamicDrafter(num_heads, args.nodes, text=text, stats=acceptance_stats)

    def learn(text: NgramTable, acceptance_stats: AcceptanceStats, recorded: list[Recorded]) -> AcceptanceStats:
        replay(make(text, acceptance_stats), recorded, args.nodes, params)
        return acceptance_stats

    served, started = (
        make(NgramTable.load_text(heads, vocab_size), AcceptanceStats.from_json(begun, num_heads)) for _ in range(2)
    )
    replay(served, first, args.nodes, params)
    drafters = {
        "fresh calibration": make(new_text, learn(new_text, AcceptanceStats(num_heads), learned)),
        "served the first workload": served,
        "just started, calibrated for the first": started,
    }
    parts = stretches(measured, args.edges)
    return parts, {
        name: [replay(drafter, part, args.nodes, params) for part in parts] for name, drafter in drafters.items()
    }


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--medusa", default="")
    parser.add_argument("--first", type=Path, required=True, help="recording of the workload calibrated for")
    parser.add_argument("--second", type=Path, required=True, help="recording of the workload that comes")
    parser.add_argument("--text", type=Path, required=True, help="JSONL whose strings are like the second workload")
    parser.add_argument("--nodes", type=number(1, 127), default=16, help="guesses of a step")
    parser.add_argument("--temperature", type=float, default=0.0, help="with which the recordings were made")
    parser.add_argument(
        "--edges", type=number(0), nargs="+", default=[0, 500, 1000, 2000], help="stretches' beginnings"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    parts, found = measure(args)
    fresh = found["fresh calibration"]
    print("| tokens per step from token | " + " | ".join(f"{edge:,}" for edge in args.edges) + " |")
    print("|---" * (1 + len(args.edges)) + "|")
    for name, values in found.items():
        shares = [
            f"{v:.2f}" if values is fresh else f"{v:.2f} ({v / f:.2f})" for v, f in zip(values, fresh, strict=True)
        ]
        print(f"| {name} | " + " | ".join(shares) + " |")
    tokens = [sum(len(record.answer) for record in part) for part in parts]
    print(json.dumps({"nodes": args.nodes, "edges": args.edges, "tokens": tokens, "rows": found}))


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
