"""How often a guess survives, by depth, rank and the probability its head gives it: what trees that change with every
step are built from.

Shape suffixes: N positions, K heads, R ranks, E probability bins.
"""

from dataclasses import dataclass

import numpy as np

from euryale.training.tree_search import NUM_RANKS, Continuations

# Bins of probability, finer where guesses are unsure: a factor of two each.
EDGES = (*(2.0**-e for e in range(9, 0, -1)), 0.75, 0.9)


@dataclass(frozen=True)
class Survival:
    """``probability_KRE``: of a guess being right when all guesses above it were; ``count_KRE``: how many guesses it
    was measured on; bin e holds head probabilities from EDGES[e - 1] up to EDGES[e]."""

    probability_KRE: np.ndarray
    count_KRE: np.ndarray

    def to_json(self) -> dict:
        return {
            "edges": list(EDGES),
            "probability": self.probability_KRE.round(4).tolist(),
            "count": self.count_KRE.tolist(),
        }


def fit(measured: Continuations, prior_count: float = 8.0) -> Survival:
    """Shares of right guesses, drawn towards the head's own mean probability in the bin by ``prior_count`` made-up
    guesses, so that bins hardly seen say what the head says. A guess at depth k counts where the heads above had the
    right token among their R likeliest, as only there a tree can have reached it."""
    ranks_NK, guesses_NKR = measured.flat(), measured.guesses_SPKR[measured.valid_SP]
    num_heads, num_bins = ranks_NK.shape[1], len(EDGES) + 1
    probability = np.zeros((num_heads, NUM_RANKS, num_bins))
    count = np.zeros((num_heads, NUM_RANKS, num_bins), dtype=np.int64)
    reached_N = np.ones(len(ranks_NK), dtype=bool)
    centers = np.sqrt(np.array([EDGES[0] / 2, *EDGES]) * np.array([*EDGES, 1.0]))
    for head in range(num_heads):
        for rank in range(NUM_RANKS):
            guessed = guesses_NKR[reached_N, head, rank]
            right = ranks_NK[reached_N, head] == rank
            bins = np.digitize(guessed, EDGES)
            count[head, rank] = np.bincount(bins, minlength=num_bins)
            number = np.maximum(count[head, rank], 1)
            mean = np.where(count[head, rank] > 0, np.bincount(bins, guessed, num_bins) / number, centers)
            hits = np.bincount(bins, right.astype(np.float64), num_bins)
            probability[head, rank] = (hits + prior_count * mean) / (count[head, rank] + prior_count)
        reached_N &= ranks_NK[:, head] < NUM_RANKS
    return Survival(probability, count)
