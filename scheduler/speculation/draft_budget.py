"""How many guesses a step verifies: as many as bring the most tokens per second, none if that is none.

A step with n guesses is worth its requests (each gets a token in any case) plus the guesses expected to be accepted,
over what the step costs. Where guessing does not pay for some steps in a row the heads are not asked any more, and
asked again from time to time, since only they can tell when it pays again.
"""

import math
from dataclasses import dataclass

import numpy as np

from euryale.scheduler.speculation.acceptance_stats import AcceptanceRateCorrection
from euryale.scheduler.step_cost import StepCosts

_SHORTEST_PAUSE, _LONGEST_PAUSE = 16, 256  # steps without heads
_MARGIN = 0.01  # of the logarithm of the rates' ratio, for and against a change
_NEWEST = 0.2  # weight of the newest step in the mean of that logarithm
SHORTEST_REACH = 32  # guesses
_OTHER_LOAD = 1.25  # times as many or as few requests are another situation


@dataclass
class BudgetChoice:
    """What was chosen for a step: ``guesses`` of ``offered`` ones, ``expected`` of them to be accepted, and the step
    predicted to take ``seconds``; ``guesses`` -1: none were considered."""

    num_requests: int = 0
    num_draft_tokens: int = -1
    num_proposed_tokens: int = 0
    expected_accepted_tokens: float = 0.0
    num_prompt_rows: int = 0
    num_context_tokens: int = 0
    predicted_seconds: float = 0.0


class Budget:
    """Chooses for one step after the other: ``begin``, then ``choose`` if that said so, then ``observe``."""

    def __init__(self, costs: StepCosts, most: int) -> None:
        """``most``: guesses of a step, however cheap."""
        self.costs, self.most = costs, most
        self.last = BudgetChoice()
        self._is_on, self._is_urgent, self._gain = True, False, 0.0
        self._best = 0
        self._correction = AcceptanceRateCorrection()  # all requests' together
        self._pause, self._resting, self._load = _SHORTEST_PAUSE, 0, 0

    def begin(self, requests: int, num_prompt_rows: int, context: int = 0, is_urgent: bool = False) -> bool:
        """Start a step with so many decoding requests, beside rows of prompts; whether to look for guesses.
        ``is_urgent``: for some of them guesses are worth more than usual."""
        self._is_urgent = is_urgent
        self.last = BudgetChoice(num_requests=requests, num_prompt_rows=num_prompt_rows, num_context_tokens=context)
        if not requests:
            return False
        if not self._is_on:
            self._resting -= 1
            if max(requests, self._load) > _OTHER_LOAD * min(requests, self._load):
                self._resting, self._load = 0, requests
        self.last.predicted_seconds = self.costs.plain(requests, context)
        if num_prompt_rows:
            self.last.predicted_seconds = float(
                self.costs.prefilling(requests, np.array([num_prompt_rows]), context)[0]
            )
        return self._is_on or self._resting < 0 or is_urgent

    def reach(self) -> int:
        """How many guesses ``choose`` is to be shown: what it will not take costs the host time all the same."""
        return min(self.most, max(SHORTEST_REACH, 2 * self.last.num_requests, 2 * self._best))

    def wants_heads(self) -> bool:
        """Whether the heads are to run in this step, for the next one."""
        return self._is_on or self._resting <= 0 or self._is_urgent

    def choose(self, acceptance_probability: np.ndarray) -> int:
        """How many of the guesses to take, likeliest first: ``acceptance_probability`` float32 [N] is the probability
        of each to be accepted, times what its request's tokens are worth."""
        now, costs = self.last, self.costs
        acceptance_probability = (
            np.minimum(acceptance_probability * self._correction.factor, 1.0)
            if not self._is_urgent
            else acceptance_probability
        )
        worth = now.num_requests + np.concatenate([[0.0], np.cumsum(acceptance_probability, dtype=np.float64)])
        extra = now.num_prompt_rows + np.arange(len(worth))
        seconds = costs.speculating(now.num_requests, extra, now.num_context_tokens, prompts=now.num_prompt_rows > 0)
        if now.num_prompt_rows:
            # Rows of prompts take their time in any case: what guesses have to beat is a step without.
            seconds += costs.speculating(now.num_requests, np.zeros(1), now.num_context_tokens)[0] - seconds[0]
        if costs.profile.steps:
            may_be = costs.are_full(now.num_requests, extra) if not now.num_prompt_rows else True
        else:
            may_be = _is_edge(now.num_requests + extra)
        plain, rates = costs.plain(now.num_requests, now.num_context_tokens), np.where(may_be, worth / seconds, 0.0)
        best = self._best = int(rates.argmax())
        if not self._is_urgent:
            gain = math.log(rates[best] * plain / now.num_requests)
            # Where no guess is taken, heads may look free; but the host has looked for nothing.
            self._weigh(gain if best else min(gain, -2 * _MARGIN))
        now.num_draft_tokens, now.num_proposed_tokens = best, len(acceptance_probability)
        now.expected_accepted_tokens = float(worth[best]) - now.num_requests
        now.predicted_seconds += float(seconds[best]) - plain
        return best

    def observe(self, seconds: float, accepted: int) -> None:
        """Take how long the step took, and how many guesses were accepted."""
        now = self.last
        if now.num_draft_tokens > 0 and not self._is_urgent:
            self._correction.learn(accepted, now.expected_accepted_tokens / self._correction.factor)
        if now.num_requests and now.predicted_seconds:
            is_speculating = now.num_draft_tokens >= 0
            if not now.num_prompt_rows and (is_speculating or not self.wants_heads()):
                self.costs.learn(
                    now.predicted_seconds, seconds, now.num_requests, max(now.num_draft_tokens, 0), is_speculating
                )

    def _weigh(self, gain: float) -> None:
        """Take the logarithm of the best rate with heads over the rate without."""
        if self._is_on:
            self._gain += _NEWEST * (gain - self._gain)
            if self._gain < -_MARGIN:
                self._rest()
        elif gain > _MARGIN:
            self._is_on, self._gain, self._pause = True, gain, _SHORTEST_PAUSE
        else:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._rest()

    def _rest(self) -> None:
        self._is_on, self._resting, self._load = False, self._pause, self.last.num_requests


def _is_edge(rows: np.ndarray) -> np.ndarray:
    """Whether a step may have so many rows, bool: eight sizes in each doubling, so that recordings of steps serve
    again; the smallest in any case."""
    coarse = np.maximum(1, 2 ** np.floor(np.log2(rows / 8))).astype(np.int64)
    found = rows % coarse == 0
    found[0] = True
    return found
