"""Statistics of accepted draft tokens, learned from every draft token below an accepted tree node.

There are separate estimates for each *sampling class*, because acceptance depends on how tokens are drawn. Each
estimate remembers about its last ``WINDOW`` cases, so that it follows a changing workload.
"""

from dataclasses import dataclass
from typing import Any

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
    """Return the sampling class: 0 greedy, 1 temperature up to 0.5, 2 above, 3 typical acceptance."""
    if params.temperature == 0:
        return 0
    if params.acceptance == "typical":
        return 3
    return 1 if params.temperature <= 0.5 else 2


class AcceptanceStats:
    """The estimates of one model.

    ``ratios`` float32 [NUM_CLASSES, depths, RANK_CLASSES, BINS]: ``accepted`` draft tokens over ``predicted`` ones,
    both float64 of the same shape. All depths below the heads count as one.

    ``weights`` float32 [NUM_CLASSES, evidence classes]: how much the request's own context counts beside heads, traffic
    and text. It is ``context_accepted`` over ``context_cases``, both float64. The evidence class is (length of the
    context - 1) * SUCCESSORS + number of known successors, or 0 if the context is unknown.
    """

    def __init__(self, num_heads: int) -> None:
        self.num_depths, self.rank_classes, self.bins = num_heads + 1, RANK_CLASSES, BINS
        self.num_evidence_classes = ORDERS * SUCCESSORS + 1
        shape = (NUM_CLASSES, self.num_depths, RANK_CLASSES, BINS)
        self.accepted = np.full(shape, PRIOR_CASES)
        self.predicted = np.full(shape, PRIOR_CASES)
        self.ratios = np.ones(shape, dtype=np.float32)
        self.weights = np.tile(np.array(CONTEXT_WEIGHTS, dtype=np.float32), (NUM_CLASSES, 1))
        self.context_cases = np.full((NUM_CLASSES, self.num_evidence_classes), 4 * PRIOR_CASES)
        self.context_accepted = self.weights * self.context_cases

    def to_json(self) -> dict[str, Any]:
        """Return the statistics of greedy requests, to be written as JSON."""
        return {name: getattr(self, name)[0].round(3).tolist() for name in _LEARNED}

    @classmethod
    def from_json(cls, content: dict[str, Any], num_heads: int) -> "AcceptanceStats":
        """Return statistics that start with those of ``to_json``; the other classes start with the greedy ratios.

        Raises ValueError if ``content`` is for another number of heads."""
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
    """The acceptance-rate correction: a factor on predicted probabilities, for one request or for all together.

    ``factor`` is the number of accepted over expected draft tokens in about the last fourteen steps, within
    CORRECTION_RANGE.
    """

    factor: float = 1.0
    _accepted: float = PRIOR_CASES
    _expected: float = PRIOR_CASES

    def learn(self, accepted: float, expected: float) -> None:
        """Update the factor by the ``accepted`` and the ``expected`` number of draft tokens of a step."""
        self._accepted = CORRECTION_DECAY * self._accepted + (1 - CORRECTION_DECAY) * PRIOR_CASES + accepted
        self._expected = CORRECTION_DECAY * self._expected + (1 - CORRECTION_DECAY) * PRIOR_CASES + expected
        low, high = CORRECTION_RANGE
        self.factor = min(high, max(low, self._accepted / self._expected))
