"""The number of draft tokens of a step: the one that maximises expected throughput, possibly zero.

A step with n draft tokens is worth its requests, each of which gets a token in any case, plus the draft tokens expected
to be accepted, over the seconds it takes. How many are best says the cost profile. Whether speculation pays at all is
decided by *measured* rates of the two modes, kept for every load: tokens per second with draft tokens and without,
both in units of what the profile says of plain decoding. Where speculation does not pay the heads rest, and run again
from time to time, since only they can tell when it pays again. While speculating a few plain steps are tried now and
then, so that the rate of plain decoding stays known.
"""

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from euryale.scheduler.speculation.acceptance_stats import AcceptanceRateCorrection
from euryale.scheduler.speculation.constants import (
    GAIN_MARGIN,
    MAX_PAUSE,
    MAX_TRIAL_INTERVAL,
    MIN_PAUSE,
    MIN_PROPOSED,
    MIN_TRIAL_INTERVAL,
    NEWEST_WEIGHT,
    NUM_PLAIN_SAMPLES,
    PRIOR_STEPS,
    RATE_WEIGHT,
    TRIAL_STEPS,
    UNCERTAINTY,
)
from euryale.scheduler.step_cost import StepCosts


@dataclass(kw_only=True)
class BudgetChoice:
    """What the budget decided for one step.

    ``num_requests`` decode beside ``num_prompt_rows`` of prompts, with ``num_context_tokens`` committed in all.
    ``is_urgent``: draft tokens of some requests are worth more than usual. ``considers_drafts``: draft tokens were
    looked for; then ``num_draft_tokens`` of ``num_proposed_tokens`` are verified, ``expected_accepted_tokens`` of which
    are expected to be accepted. ``wants_heads``: the heads run in this step, for the next one. ``predicted_seconds``:
    the step's time; ``predicted_rate``: tokens per second expected, in units of plain decoding's by the profile.
    """

    num_requests: int = 0
    num_prompt_rows: int = 0
    num_context_tokens: int = 0
    is_urgent: bool = False
    considers_drafts: bool = False
    wants_heads: bool = False
    num_draft_tokens: int = 0
    num_proposed_tokens: int = 0
    expected_accepted_tokens: float = 0.0
    predicted_seconds: float = 0.0
    predicted_rate: float = 0.0


@dataclass(kw_only=True)
class _LoadState:
    """What is known of one load. ``plain_rates``: measured rates of the latest plain steps; ``measured`` and
    ``predicted``: decaying sums of the rates of speculative steps; ``gain``: mean logarithm of the rate with draft
    tokens over the rate without; ``pause``: steps of the last pause of the heads; ``num_on``: speculative steps since;
    ``num_resting``: steps left of the current pause; ``num_until_trial``: speculative steps until the next plain
    one."""

    is_speculating: bool = True
    gain: float = 0.0
    pause: int = MIN_PAUSE // 2
    num_on: int = 0
    num_resting: int = 0
    trial_interval: int = MIN_TRIAL_INTERVAL
    num_until_trial: int = MIN_TRIAL_INTERVAL
    plain_rate: float = 1.0
    plain_rates: deque[float] = field(default_factory=lambda: deque([1.0], maxlen=NUM_PLAIN_SAMPLES))
    measured: float = 1.0
    predicted: float = 1.0
    num_measured: int = PRIOR_STEPS

    def add_plain(self, rate: float) -> None:
        """Take the measured rate of a plain step; the median is robust against disturbed steps."""
        self.plain_rates.append(rate)
        ordered = sorted(self.plain_rates)
        self.plain_rate = ordered[len(ordered) // 2]

    def add_speculative(self, measured: float, predicted: float) -> None:
        """Take the measured and the predicted rate of a speculative step."""
        self.num_measured += 1
        weight = max(RATE_WEIGHT, 1 / self.num_measured)
        self.measured += weight * (measured - self.measured)
        self.predicted += weight * (predicted - self.predicted)

    def begin_pause(self) -> None:
        """Let the heads rest: after a long spell of speculation briefly, else longer than the last time."""
        self.pause = MIN_PAUSE if self.num_on > self.pause else min(2 * self.pause, MAX_PAUSE)
        self.is_speculating, self.num_resting, self.num_on = False, self.pause, 0

    def weigh(self, gain: float) -> None:
        """Take the logarithm of the rate with draft tokens over the rate without, and change the mode if it says so."""
        if self.is_speculating:
            self.num_on += 1
            self.gain += NEWEST_WEIGHT * (gain - self.gain)
            if self.gain < -GAIN_MARGIN:
                self.begin_pause()
        elif gain > GAIN_MARGIN:
            self.is_speculating, self.gain = True, gain
            self.trial_interval = self.num_until_trial = MIN_TRIAL_INTERVAL
        elif self.pause == MAX_PAUSE and gain > -UNCERTAINTY:
            self.is_speculating, self.gain = True, 0.0  # for a step or two, to measure what was only predicted
        else:
            self.begin_pause()


class DraftBudget:
    """Decides for one step after the other: ``begin``, then ``choose`` if draft tokens are considered, then
    ``observe``. A decision is a BudgetChoice, which the caller hands from one call to the next."""

    def __init__(self, costs: StepCosts, max_draft_tokens: int) -> None:
        """``max_draft_tokens``: of a step, however cheap they are."""
        self.costs, self.max_draft_tokens = costs, max_draft_tokens
        self._loads: dict[int, _LoadState] = {}
        self._last_load = -1
        self._num_chosen = 0  # draft tokens of the last step that considered any
        self._correction = AcceptanceRateCorrection()  # of all requests together

    def begin(
        self, num_requests: int, num_prompt_rows: int, num_context_tokens: int = 0, is_urgent: bool = False
    ) -> BudgetChoice:
        """Return the choice for a step of so many decoding requests beside rows of prompts, before draft tokens are
        known: whether they are considered, and whether the heads run."""
        choice = BudgetChoice(
            num_requests=num_requests,
            num_prompt_rows=num_prompt_rows,
            num_context_tokens=num_context_tokens,
            is_urgent=is_urgent,
        )
        if not num_requests:  # a prompt alone: what follows is most likely the load of before
            load = self._loads.get(self._last_load)
            choice.wants_heads = load is None or load.is_speculating or load.num_resting <= 0
            return choice
        load = self._state(num_requests)
        choice.predicted_seconds = self.costs.plain(num_requests, num_context_tokens)
        if num_prompt_rows:
            rows = np.array([num_prompt_rows])
            choice.predicted_seconds = float(self.costs.prefilling(num_requests, rows, num_context_tokens)[0])
        if load.is_speculating:
            is_trial = self._is_trial(load, choice)
            choice.considers_drafts = not is_trial
            choice.wants_heads = not is_trial or is_urgent
        else:
            load.num_resting -= 1
            choice.considers_drafts = load.num_resting < 0
            choice.wants_heads = load.num_resting <= 0
        if is_urgent:
            choice.considers_drafts = choice.wants_heads = True
        return choice

    def max_proposed(self, choice: BudgetChoice) -> int:
        """Return how many draft tokens ``choose`` is to be shown; those it will not take cost the host time too."""
        return min(self.max_draft_tokens, max(MIN_PROPOSED, 2 * choice.num_requests, 2 * self._num_chosen))

    def choose(self, choice: BudgetChoice, acceptance_probability: np.ndarray) -> int:
        """Return how many draft tokens to verify, the likeliest first, and note it in ``choice``.

        ``acceptance_probability`` float32 [N], in decreasing order: of each draft token, times what tokens of its
        request are worth.
        """
        num_requests, costs = choice.num_requests, self.costs
        probability = acceptance_probability
        if not choice.is_urgent:
            probability = np.minimum(acceptance_probability * self._correction.factor, 1.0)
        worth = num_requests + np.concatenate([[0.0], np.cumsum(probability, dtype=np.float64)])
        seconds, is_allowed = self._step_seconds(choice, len(worth))
        rates = np.where(is_allowed, worth / seconds, 0.0)
        best = self._num_chosen = int(rates.argmax())
        choice.num_draft_tokens, choice.num_proposed_tokens = best, len(acceptance_probability)
        choice.expected_accepted_tokens = float(worth[best]) - num_requests
        choice.predicted_seconds += float(seconds[best]) - costs.plain(num_requests, choice.num_context_tokens)
        choice.predicted_rate = float(rates[best]) * self._unit(choice)
        if not choice.is_urgent:
            load = self._state(num_requests)
            gain = math.log(choice.predicted_rate * load.measured / load.predicted / load.plain_rate)
            # Where no draft token is taken the heads may look free; but the host looked for draft tokens in vain.
            load.weigh(gain if best else min(gain, -2 * GAIN_MARGIN))
            choice.wants_heads = load.is_speculating
        return best

    def observe(self, choice: BudgetChoice, seconds: float, num_accepted: int) -> None:
        """Take how long the step took, and how many of its draft tokens were accepted."""
        if choice.num_draft_tokens > 0 and not choice.is_urgent:
            expected = choice.expected_accepted_tokens / self._correction.factor
            self._correction.learn(num_accepted, expected)
        if not choice.num_requests or choice.num_prompt_rows or not choice.predicted_seconds:
            return
        if not (choice.considers_drafts or not choice.wants_heads):
            return  # heads that run without draft tokens: neither mode
        load, rate = self._state(choice.num_requests), self._unit(choice) / seconds
        # A step that took several times as long was disturbed: it may say that much less.
        rate = max(rate, 0.25 * min(load.plain_rate, 1.0))
        if not choice.considers_drafts:
            load.add_plain(rate)
        elif not choice.is_urgent:
            rate *= 1 + num_accepted / choice.num_requests
            load.add_speculative(rate, choice.predicted_rate)
        self.costs.learn(
            choice.predicted_seconds, seconds, choice.num_requests, choice.num_draft_tokens, choice.considers_drafts
        )

    def _step_seconds(self, choice: BudgetChoice, count: int) -> tuple[np.ndarray, np.ndarray | bool]:
        """Return the predicted seconds of steps with 0 to ``count`` - 1 draft tokens, float64 [count], and which of
        these sizes may be chosen, bool [count] or True."""
        costs, num_requests, has_prompts = self.costs, choice.num_requests, choice.num_prompt_rows > 0
        extra = choice.num_prompt_rows + np.arange(count)
        seconds = costs.speculating(num_requests, extra, choice.num_context_tokens, prompts=has_prompts)
        if has_prompts:
            # Rows of prompts take their time in any case: draft tokens have to beat a step without them.
            seconds += costs.speculating(num_requests, np.zeros(1), choice.num_context_tokens)[0] - seconds[0]
        if not costs.profile.is_padded:
            return seconds, _is_edge(num_requests + extra)
        return seconds, True if has_prompts else costs.are_full(num_requests, extra)

    def _unit(self, choice: BudgetChoice) -> float:
        """Seconds that the uncorrected profile gives a request's token in plain decoding: multiplied by tokens per
        second it makes a rate that is 1 for plain decoding as profiled."""
        return self.costs.profiled_plain(choice.num_requests, choice.num_context_tokens)

    def _is_trial(self, load: _LoadState, choice: BudgetChoice) -> bool:
        """Whether this step of a speculating load tries plain decoding."""
        if choice.num_prompt_rows or choice.is_urgent:
            return False
        load.num_until_trial -= 1
        if load.num_until_trial >= 0:
            return False
        if load.num_until_trial <= -TRIAL_STEPS:
            load.trial_interval = min(2 * load.trial_interval, MAX_TRIAL_INTERVAL)
            load.num_until_trial = load.trial_interval
        return True

    def _state(self, num_requests: int) -> _LoadState:
        """Return the state of a load, half an octave of requests; when the load changes a pause is cut short."""
        load = int(2 * math.log2(max(num_requests, 1)))
        state = self._loads.setdefault(load, _LoadState())
        if load != self._last_load:
            self._last_load = load
            state.num_resting = min(state.num_resting, MIN_PAUSE)
        return state


def _is_edge(rows: np.ndarray) -> np.ndarray:
    """Return whether a step may have so many rows, bool: eight sizes in each doubling, so that recordings of steps
    serve again; the smallest in any case."""
    coarse = np.maximum(1, 2 ** np.floor(np.log2(rows / 8))).astype(np.int64)
    found = rows % coarse == 0
    found[0] = True
    return found
