"""Dynamic trees under a change of workload: calibrated for one kind of text, used on another.

``python -m euryale.benchmarks.shift --model DIR --first code.npz --second gsm8k.npz --text FILE`` replays recorded
answers (``record_heads.py``) with the real drafter. One drafter starts from the calibration beside the heads, and
serves the first recording and then half of the second. Another is calibrated for the second workload: on n-grams of
``--text``, and on the other half of the second recording. The report gives their tokens per step in consecutive
stretches of served tokens, also as a fraction of the newly calibrated drafter's.
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
from euryale.training.replay import AnswerRecord, replay


def load(path: Path) -> list[AnswerRecord]:
    """Return the answers of a recording."""
    answers = RecordedAnswers(path)
    made = [answers.make(key) for key in range(len(answers))]
    return [AnswerRecord(a.prompt, a.truth, a.ids[1:], a.logits[1:]) for a in made]


def count_ngrams(args: argparse.Namespace) -> NgramTable:
    """Return the n-grams of the strings in a JSONL file; each line is a document."""
    tokenizer = load_tokenizer(args.model)
    with args.text.open(encoding="utf-8") as file:
        lines = ["\n".join(v for v in json.loads(line).values() if isinstance(v, str)) for line in file]
    return NgramTable.of_text([np.asarray(tokenizer.encode(line), dtype=np.int32) for line in lines])


def stretches(recorded: list[AnswerRecord], edges: list[int]) -> list[list[AnswerRecord]]:
    """Return the answers in groups that begin once ``edges`` tokens were served. ValueError if a group is empty."""
    parts: list[list[AnswerRecord]] = [[] for _ in edges]
    served = 0
    for record in recorded:
        parts[sum(served >= edge for edge in edges) - 1].append(record)
        served += len(record.answer)
    if not all(parts):
        raise ValueError(f"the second recording is too short for stretches from {edges} tokens on: record more prompts")
    return parts


def measure(args: argparse.Namespace) -> tuple[list[list[AnswerRecord]], dict[str, list[float]]]:
    """Return the stretches, and every drafter's tokens per step in each of them."""
    first, second = load(args.first), load(args.second)
    measured, learned, num_heads = second[::2], second[1::2], second[0].ids_PKR.shape[1]
    params, heads = SamplingParams(temperature=args.temperature), Path(args.medusa or args.model)
    vocab_size = RecordedAnswers(args.first).vocab_size
    new_text = count_ngrams(args)
    begun = json.loads((heads / "calibration.json").read_text())["acceptance_stats"]

    def make(text: NgramTable, acceptance_stats: AcceptanceStats) -> DynamicDrafter:
        return DynamicDrafter(num_heads, args.draft_tokens, text=text, stats=acceptance_stats)

    def learn(text: NgramTable, acceptance_stats: AcceptanceStats, recorded: list[AnswerRecord]) -> AcceptanceStats:
        replay(make(text, acceptance_stats), recorded, args.draft_tokens, params)
        return acceptance_stats

    served, started = (
        make(NgramTable.load_text(heads, vocab_size), AcceptanceStats.from_json(begun, num_heads)) for _ in range(2)
    )
    replay(served, first, args.draft_tokens, params)
    drafters = {
        "fresh calibration": make(new_text, learn(new_text, AcceptanceStats(num_heads), learned)),
        "served the first workload": served,
        "just started, calibrated for the first": started,
    }
    parts = stretches(measured, args.edges)
    return parts, {
        name: [replay(drafter, part, args.draft_tokens, params) for part in parts] for name, drafter in drafters.items()
    }


def parser_of_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--medusa", default="")
    parser.add_argument("--first", type=Path, required=True, help="recording of the calibrated workload")
    parser.add_argument("--second", type=Path, required=True, help="recording of the new workload")
    parser.add_argument("--text", type=Path, required=True, help="JSONL with strings that resemble the second workload")
    parser.add_argument("--draft-tokens", type=number(1, 127), default=16, help="draft tokens per step")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature of the recordings")
    parser.add_argument(
        "--edges", type=number(0), nargs="+", default=[0, 500, 1000, 2000], help="tokens served before each stretch"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    parts, found = measure(args)
    fresh = found["fresh calibration"]
    print("| tokens per step from token | " + " | ".join(f"{edge:,}" for edge in args.edges) + " |")
    print("|---" * (1 + len(args.edges)) + "|")
    for name, values in found.items():
        cells = [
            f"{v:.2f}" if values is fresh else f"{v:.2f} ({v / f:.2f})" for v, f in zip(values, fresh, strict=True)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    tokens = [sum(len(record.answer) for record in part) for part in parts]
    print(json.dumps({"num_draft_tokens": args.draft_tokens, "edges": args.edges, "tokens": tokens, "rows": found}))


if __name__ == "__main__":
    arguments.run(parser_of_arguments(), main)
