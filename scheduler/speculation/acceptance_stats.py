"""How likely a guess is right: learned from every guess that was put to the test.

Estimates are kept per *class* of requests, as a guess that is right for greedy decoding may be wrong for sampling. All
of them forget: each remembers about its last ``WINDOW`` cases, so that it follows when the workload changes."""

from dataclasses import dataclass

import numpy as np

from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.speculation.ngram_table import ORDERS, SUCCESSORS

NUM_CLASSES = 4
RANK_CLASSES = 4  # the head's likeliest token, its second, its others, and tokens it did not name
LIKELY_BINS = 8  # of probabilities from 1/2 on, two for each halving of what they lack to 1
BINS = 18 + LIKELY_BINS  # of probability, below 1/2 two for each factor of two
WINDOW = 60.0
_BELIEF = 4.0  # cases that a starting value counts for
_LEARNED = ("accepted", "predicted", "context_accepted", "context_cases")
_KEEP = 0.93  # of what is known of a request, at each of its steps

# Share of cases in which what followed the context before is the better guide than heads and text, by evidence (the
# context's length less one times SUCCESSORS, plus how many successors are known); measured on sampled code.
_STARTING_WEIGHTS = (0, 0.15, 0.1, 0.2, 0.25, 0.4, 0.3, 0.35, 0.5, 0.6, 0.6, 0.75, 0.9)


def sampling_class_of(params: SamplingParams) -> int:
    """Greedy, cool or hot sampling, and the lossy rule, which accepts more."""
    if params.temperature == 0:
        return 0
    if params.acceptance == "typical":
        return 3
    return 1 if params.temperature <= 0.5 else 2


class AcceptanceStats:
    """The estimates of one model.

    ``ratios`` float32 [classes, depths, RANK_CLASSES, BINS]: right guesses for each one predicted (``accepted`` over
    ``expected``, float64), where the depths below all heads are one. ``weights`` float32 [classes, evidences]: of the
    request's own context beside heads and text (``context_accepted`` over ``context_cases``, float64)."""

    def __init__(self, num_heads: int) -> None:
        self.num_depths, self.rank_classes, self.bins = num_heads + 1, RANK_CLASSES, BINS
        self.evidences = ORDERS * SUCCESSORS + 1
        shape = (NUM_CLASSES, self.num_depths, RANK_CLASSES, BINS)
        self.accepted = np.full(shape, _BELIEF)
        self.predicted = np.full(shape, _BELIEF)
        self.ratios = np.ones(shape, dtype=np.float32)
        self.weights = np.tile(np.array(_STARTING_WEIGHTS, dtype=np.float32), (NUM_CLASSES, 1))
        self.context_cases = np.full((NUM_CLASSES, self.evidences), 4 * _BELIEF)
        self.context_accepted = self.weights * self.context_cases

    def to_json(self) -> dict:
        """What was learned of greedy requests."""
        return {name: getattr(self, name)[0].round(3).tolist() for name in _LEARNED}

    @classmethod
    def from_json(cls, content: dict, num_heads: int) -> "AcceptanceStats":
        """Estimates that begin with ``to_json``'s; what holds for greedy requests is the first guess for others.
        ValueError if they are of another number of heads."""
        made = cls(num_heads)
        for name in _LEARNED:
            found, own = np.asarray(content.get(name, ()), dtype=np.float64), getattr(made, name)
            if found.shape != own.shape[1:] or not np.all(found >= 0):
                raise ValueError(f"its acceptance_stats.{name} does not fit {num_heads} heads")
            own[0] = found
        made.accepted[1:] = _BELIEF * (made.accepted[0] / np.maximum(made.predicted[0], 1e-9))
        made.context_accepted[1:] = made.context_cases[1:] * (
            made.context_accepted[0] / np.maximum(made.context_cases[0], 1e-9)
        )
        made.ratios[:] = made.accepted / np.maximum(made.predicted, 1e-9)
        made.weights[:] = made.context_accepted / np.maximum(made.context_cases, 1e-9)
        return made


@dataclass
class AcceptanceRateCorrection:
    """How much better or worse than predicted one request's guesses do, a factor on their probability: right guesses
    for each one predicted over about the last fourteen steps."""

    factor: float = 1.0
    _hits: float = _BELIEF
    _expected: float = _BELIEF

    def learn(self, accepted: float, expected: float) -> None:
        """Take how many guesses on the accepted path were right, and how many were predicted to be."""
        self._hits = _KEEP * self._hits + (1 - _KEEP) * _BELIEF + accepted
        self._expected = _KEEP * self._expected + (1 - _KEEP) * _BELIEF + expected
        self.factor = min(1.6, max(0.3, self._hits / self._expected))
