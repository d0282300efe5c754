"""How likely a guess is right: learned from every guess that was put to the test.

Estimates are kept per *class* of requests, as a guess that is right for greedy decoding may be wrong for sampling. All
of them forget: each remembers about its last ``WINDOW`` cases, so that it follows when the workload changes."""

from dataclasses import dataclass

import numpy as np

from euryale.client.rules import shown
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.speculation.constants import (
    BINS,
    CONTEXT_WEIGHTS,
    CORRECTION_DECAY,
    CORRECTION_RANGE,
    NUM_CLASSES,
    ORDERS,
    PRIOR_CASES,
    RANK_CLASSES,
    SUCCESSORS,
)

_MAX_CASES = 1e9  # that a file may claim to have seen
_LEARNED = ("accepted", "predicted", "context_accepted", "context_cases")


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
        self.accepted = np.full(shape, PRIOR_CASES)
        self.predicted = np.full(shape, PRIOR_CASES)
        self.ratios = np.ones(shape, dtype=np.float32)
        self.weights = np.tile(np.array(CONTEXT_WEIGHTS, dtype=np.float32), (NUM_CLASSES, 1))
        self.context_cases = np.full((NUM_CLASSES, self.evidences), 4 * PRIOR_CASES)
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
            own = getattr(made, name)
            try:
                found = np.asarray(content.get(name, ()))
            except ValueError:  # rows of different lengths
                found = np.asarray(())
            is_fitting = found.shape == own.shape[1:] and found.dtype.kind in "iuf"
            if not is_fitting or not np.all((found >= 0) & (found <= _MAX_CASES)):
                shape = " x ".join(map(str, own.shape[1:]))
                raise ValueError(
                    f"acceptance_stats.{name} must be {shape} numbers from 0 to {_MAX_CASES:g} for {num_heads} heads, "
                    f"not {shown(content.get(name))}"
                )
            own[0] = found
        made.accepted[1:] = PRIOR_CASES * (made.accepted[0] / np.maximum(made.predicted[0], 1e-9))
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
    _accepted: float = PRIOR_CASES
    _expected: float = PRIOR_CASES

    def learn(self, accepted: float, expected: float) -> None:
        """Take how many guesses on the accepted path were right, and how many were predicted to be."""
        self._accepted = CORRECTION_DECAY * self._accepted + (1 - CORRECTION_DECAY) * PRIOR_CASES + accepted
        self._expected = CORRECTION_DECAY * self._expected + (1 - CORRECTION_DECAY) * PRIOR_CASES + expected
        low, high = CORRECTION_RANGE
        self.factor = min(high, max(low, self._accepted / self._expected))
