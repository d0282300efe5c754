"""Search of the static tree that fits a backbone's own answers (Medusa paper, arXiv 2401.10774, section 2.3.3).

The *rank* of a token at a head is the number of tokens with higher logits; NUM_RANKS stands for all ranks from
NUM_RANKS on. This module sees ranks only, no model.

Shape suffixes: S answers, P positions of an answer, N positions of all answers, K heads, R ranks.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from euryale.scheduler.speculation.tree import search_tree

NUM_RANKS = 10
TREE_SIZES = (4, 8, 12, 16, 24, 32, 63)


@dataclass(frozen=True)
class Continuations:
    """Ranks of the backbone's own greedy answers at the heads.

    ``ranks_SPK`` int64: rank at head k of the token k + 2 positions later. ``valid_SP`` bool: whether all K of these
    tokens belong to the answer. Position 0 is the prompt's last token.
    """

    ranks_SPK: np.ndarray
    valid_SP: np.ndarray

    def flat(self) -> np.ndarray:
        """Return the ranks at the valid positions, [N, K]."""
        return self.ranks_SPK[self.valid_SP]

    def select(self, answers_S: np.ndarray) -> "Continuations":
        """Return only the given answers; ``answers_S`` bool."""
        return Continuations(self.ranks_SPK[answers_S], self.valid_SP[answers_S])


def accuracy_by_rank(ranks_NK: np.ndarray) -> np.ndarray:
    """Return the probability that the target has rank r at head k, float64 [K, R]."""
    return np.stack([(ranks_NK == r).mean(axis=0) for r in range(NUM_RANKS)], axis=1)


def search_joint_tree(ranks_NK: np.ndarray, num_draft_tokens: int, prior_count: float = 64.0) -> list[list[int]]:
    """Return the paths of the best static tree in decreasing order of gain: every prefix is the best tree of its size.

    A path's gain is the probability that all its draft tokens are right together. The paper multiplies the accuracies
    of the heads, as if they were independent; here paths are counted. Below a path with count n, the next token's
    probability is its count plus ``prior_count`` times the head's accuracy, divided by n + ``prior_count``. Rare paths
    thus fall back to the product. A child never gains more than its parent, so the greedy order is optimal.
    """
    num_heads = ranks_NK.shape[1]
    accuracy = accuracy_by_rank(ranks_NK)
    counts: Counter = Counter({(): len(ranks_NK)})
    for depth in range(1, num_heads + 1):
        counts.update(map(tuple, ranks_NK[:, :depth].tolist()))
    heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    paths: list[list[int]] = []
    while heap and len(paths) <= num_draft_tokens:
        negative_gain, path = heapq.heappop(heap)
        paths.append(list(path))
        if len(path) == num_heads:
            continue
        for rank in range(NUM_RANKS):
            expected = counts[(*path, rank)] + prior_count * accuracy[len(path), rank]
            heapq.heappush(heap, (negative_gain * expected / (counts[path] + prior_count), (*path, rank)))
    return paths[1:]


def num_accepted_tokens(ranks: np.ndarray, paths: list[list[int]]) -> np.ndarray:
    """Return how many draft tokens of a tree are accepted at each position: int64 [...] for ranks [..., K].

    ``paths`` must list every prefix of a path.
    """
    base = NUM_RANKS + 1
    lengths = np.zeros(ranks.shape[:-1], dtype=np.int64)
    for depth in range(1, ranks.shape[-1] + 1):
        weights = base ** np.arange(depth)
        nodes = [int(np.dot(path, weights)) for path in paths if len(path) == depth]
        lengths += np.isin(ranks[..., :depth] @ weights, nodes)
    return lengths


def step_starts(measured: Continuations, paths: list[list[int]]) -> np.ndarray:
    """Return the positions at which decoding steps start, bool [S, P].

    A step that accepts n draft tokens is followed by one that starts n + 1 positions later.
    """
    starts = np.zeros_like(measured.valid_SP)
    for row, lengths, valid in zip(
        starts, num_accepted_tokens(measured.ranks_SPK, paths), measured.valid_SP, strict=True
    ):
        position = 0
        while position < len(valid) and valid[position]:
            row[position] = True
            position += 1 + int(lengths[position])
    return starts


def tokens_per_step(measured: Continuations, paths: list[list[int]]) -> float:
    """Return the mean number of tokens per step when the answers are decoded, bonus tokens included."""
    starts = step_starts(measured, paths)
    return 1 + float(num_accepted_tokens(measured.ranks_SPK[starts], paths).mean())


def search_walked_tree(measured: Continuations, num_draft_tokens: int, rounds: int = 6) -> list[list[int]]:
    """Return the best of several joint trees, in decreasing order of gain.

    Steps skip the tokens they accept, so that they start at positions that are harder to predict than the average. Each
    round therefore searches at the positions where steps with the previous round's tree start.
    """
    best: list[list[int]] = []
    ranks_NK = measured.flat()
    for _ in range(rounds):
        paths = search_joint_tree(ranks_NK, num_draft_tokens)
        if not best or tokens_per_step(measured, paths) > tokens_per_step(measured, best):
            best = paths
        ranks_NK = measured.ranks_SPK[step_starts(measured, paths)]
    return best


def acceptance_probability(measured: Continuations, paths: list[list[int]]) -> list[float]:
    """Return the fraction of decoding steps that accept each draft token of a tree."""
    ranks_NK = measured.ranks_SPK[step_starts(measured, paths)]
    return [float((ranks_NK[:, : len(path)] == path).all(axis=1).mean()) for path in paths]


def compare_trees(searched: Continuations, measured: Continuations, sizes: Sequence[int] = TREE_SIZES) -> list[dict]:
    """Return one row per tree size, for trees searched on one set of answers and measured on another.

    ``expected``: mean tokens per step if steps started at all positions. ``tokens_per_step``: the same over the
    positions where steps start. ``independent``: the same for the tree that assumes independent heads. ``paths``: the
    tree.
    """
    accuracy = accuracy_by_rank(searched.flat())
    rows = []
    for size in sizes:
        paths = search_walked_tree(searched, size)
        row: dict[str, float] = {"num_draft_tokens": len(paths)}
        row["expected"] = 1 + float(num_accepted_tokens(measured.flat(), paths).mean())
        row["tokens_per_step"] = tokens_per_step(measured, paths)
        row["independent"] = tokens_per_step(measured, search_tree(accuracy, size).paths())
        rows.append({name: round(value, 4) for name, value in row.items()} | {"paths": paths})
    return rows
