"""Search of the static tree that a decoder's own answers ask for (Medusa paper, arXiv 2401.10774, section 2.3.3).

The *rank* of a token at a head is how many tokens that head likes better, NUM_RANKS standing for "too many". This
file sees ranks only, no model.

Shape suffixes: S answers, P positions of an answer, N positions of all, K heads, R ranks.
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
    """What the heads would have said along the backbone's own greedy answers.

    ``ranks_SPK`` int64: rank of the token that came ``k + 2`` later; ``valid_SP`` bool: whether all K of these
    tokens belong to the answer. Position 0 is the prompt's last token.
    """

    ranks_SPK: np.ndarray
    valid_SP: np.ndarray

    def flat(self) -> np.ndarray:
        """Ranks at the valid positions, [N, K]."""
        return self.ranks_SPK[self.valid_SP]

    def some(self, answers_S: np.ndarray) -> "Continuations":
        """Those of the chosen answers alone."""
        return Continuations(self.ranks_SPK[answers_S], self.valid_SP[answers_S])


def accuracy_by_rank(ranks_NK: np.ndarray) -> np.ndarray:
    """Probability that a head's guess of rank r is right, float64 [K, R]."""
    return np.stack([(ranks_NK == r).mean(axis=0) for r in range(NUM_RANKS)], axis=1)


def search_joint_tree(ranks_NK: np.ndarray, num_draft_tokens: int, prior_count: float = 64.0) -> list[list[int]]:
    """The paths of the best static tree, in decreasing order of gain: any prefix of the list is the best tree of
    its size.

    A path adds to the expected accepted length the probability that all its guesses are right *together*. The
    paper multiplies the heads' accuracies as if they were independent; here the paths are counted. Below a path
    seen n times, the next guess's probability is its count plus ``prior_count`` times the head's accuracy, over n +
    ``prior_count``: rare paths fall back to the product. As a child never gains more than its parent, taking the
    largest gain next is optimal.
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
    """How many guesses of a tree with all prefixes listed are accepted at each position: int64 [...] for ranks
    [..., K]."""
    base = NUM_RANKS + 1
    lengths = np.zeros(ranks.shape[:-1], dtype=np.int64)
    for depth in range(1, ranks.shape[-1] + 1):
        weights = base ** np.arange(depth)
        nodes = [int(np.dot(path, weights)) for path in paths if len(path) == depth]
        lengths += np.isin(ranks[..., :depth] @ weights, nodes)
    return lengths


def visited(measured: Continuations, paths: list[list[int]]) -> np.ndarray:
    """Where decoding steps start when every answer is walked as the engine would, bool [S, P]: after a step that
    accepted n guesses the next one starts n + 1 positions further."""
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
    """Mean tokens of the steps that decode the answers."""
    starts = visited(measured, paths)
    return 1 + float(num_accepted_tokens(measured.ranks_SPK[starts], paths).mean())


def search_walked_tree(measured: Continuations, num_draft_tokens: int, rounds: int = 6) -> list[list[int]]:
    """The best of a few joint trees, in decreasing order of gain.

    A decoder does not stop everywhere: it skips what it accepted, so that steps start where guessing is harder than on
    average. So every round searches on the positions where the previous round's tree stops.
    """
    best, candidates = [], measured.flat()
    for _ in range(rounds):
        paths = search_joint_tree(candidates, num_draft_tokens)
        if not best or tokens_per_step(measured, paths) > tokens_per_step(measured, best):
            best = paths
        candidates = measured.ranks_SPK[visited(measured, paths)]
    return best


def acceptance_probability(measured: Continuations, paths: list[list[int]]) -> list[float]:
    """How often each guess of a tree is accepted: its share of the steps that decode the answers."""
    ranks_NK = measured.ranks_SPK[visited(measured, paths)]
    return [float((ranks_NK[:, : len(path)] == path).all(axis=1).mean()) for path in paths]


def compare_trees(searched: Continuations, measured: Continuations, sizes: Sequence[int] = TREE_SIZES) -> list[dict]:
    """One row per tree size, the trees searched on one set of answers and measured on another. ``expected``:
    1 + mean accepted length over all positions; ``tokens_per_step``: over those where steps start; ``independent``:
    the same of the tree that assumes independent heads; ``paths``: the tree."""
    accuracy = accuracy_by_rank(searched.flat())
    rows = []
    for size in sizes:
        paths = search_walked_tree(searched, size)
        row = {"nodes": len(paths), "expected": 1 + float(tokens_per_step(measured.flat(), paths).mean())}
        row["tokens_per_step"] = tokens_per_step(measured, paths)
        row["independent"] = tokens_per_step(measured, search_tree(accuracy, size).paths())
        rows.append({name: round(value, 4) for name, value in row.items()} | {"paths": paths})
    return rows
