"""Comparison of the tree search with a published tree, on published head accuracies alone.

``python -m euryale.benchmarks.published_tree --accuracy vicuna_head_accuracy.csv --tree mc_sim_7b_63.json`` searches a
tree of the same size for every row of accuracies. It reports the expected tokens per step of both, assuming independent
heads.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

from euryale.scheduler.speculation.tree import TreeShape, load_tree, search_tree

NUM_RANKS = 5


def expected_tokens(shape: TreeShape, accuracy: np.ndarray) -> float:
    """Return the expected tokens per step, the bonus token included; unmeasured ranks count as never right."""
    known = np.pad(accuracy, ((0, 0), (0, shape.num_candidates)))
    return 1 + sum(float(np.prod([known[depth, rank] for depth, rank in enumerate(path)])) for path in shape.paths())


def accuracies(path: Path) -> dict[str, np.ndarray]:
    """Return name -> accuracy [heads, ranks], from the cumulative columns ``train/medusa{h}_top{r}`` of a CSV file."""
    found = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            heads = [h for h in range(20) if f"train/medusa{h}_top1" in row]
            top = [[float(row[f"train/medusa{h}_top{r}"]) for r in range(1, NUM_RANKS + 1)] for h in heads]
            found[row["Name"]] = np.diff(np.asarray(top), axis=1, prepend=0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accuracy", type=Path, required=True)
    parser.add_argument("--tree", type=Path, required=True)
    args = parser.parse_args()
    report = {}
    for name, accuracy in accuracies(args.accuracy).items():
        published = load_tree(args.tree, len(accuracy))
        searched = search_tree(accuracy, published.num_draft_tokens)
        report[name] = {
            "num_draft_tokens": published.num_draft_tokens,
            "published": round(expected_tokens(published, accuracy), 4),
            "searched": round(expected_tokens(searched, accuracy), 4),
        }
        print(name, report[name], flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
