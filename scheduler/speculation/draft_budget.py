"""The number of draft tokens of a step: the one that maximises expected throughput, possibly zero.

A step yields one token for each decoding request, plus the accepted draft tokens. The best number of draft tokens has
the highest expected yield per second, as the cost model predicts it.

Whether a load speculates at all is decided by *measured* rates of both modes: tokens per second with and without draft
tokens. A load is a range of numbers of running requests. Rates are in units of plain decoding as profiled. Where
speculation does not pay, the heads pause and are tried again from time to time. A speculating load tries a few plain
steps now and then, so that both rates stay known.
"""

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from euryale.scheduler.speculation.acceptance_stats import AcceptanceRateCorrection
from euryale.scheduler.speculation.constants import (
    FORGETTING,
    GAIN_MARGIN,
    MAX_PAUSE,
    MAX_TRIAL_INTERVAL,
    MEASURED_INTERVAL,
    MIN_PAUSE,
    MIN_PROPOSED,
    MIN_TRIAL_INTERVAL,
    NEWEST_WEIGHT,
    NUM_PLAIN_SAMPLES,
    PRIOR_STEPS,
    RATE_WEIGHT,
    STARTING_GAIN,
    TRIAL_STEPS,
    UNCERTAINTY,
)
from euryale.scheduler.step_cost import StepCosts


@dataclass(kw_only=True)
class BudgetChoice:
    """The decision of the budget for one step.

    ``num_requests`` of ``num_running`` requests decode beside ``num_prompt_rows`` prompt rows, with
    ``num_context_tokens`` committed tokens in total. ``is_urgent``: some request is behind its latency target.
    ``considers_drafts``: draft tokens are proposed; then ``num_draft_tokens`` of ``num_proposed_tokens`` are verified,
    and ``expected_accepted_tokens`` of these should be accepted. ``wants_heads``: the heads run in this step, for the
    next one. ``predicted_seconds``: time of the step. ``predicted_rate``: expected tokens per second, in units of plain
    decoding as profiled.
    """

    num_requests: int = 0
    num_running: int = 0
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
    """The state of one load.

    ``gain``: mean logarithm of the rate with draft tokens over the rate without. ``plain_rates``: measured rates of the
    latest plain steps, ``plain_rate`` their median. ``measured`` and ``predicted``: mean rates of speculative steps,
    over ``num_measured`` of them. ``pause``: steps of the last pause of the heads; ``num_on``: speculative steps since;
    ``num_paused``: steps left of the current pause. ``num_until_trial``: speculative steps until the next plain one.
    """

    is_speculating: bool = True
    gain: float = 0.0
    pause: int = MIN_PAUSE // 2
    num_on: int = 0
    num_paused: int = 0
    trial_interval: int = MIN_TRIAL_INTERVAL
    num_until_trial: int = MIN_TRIAL_INTERVAL
    plain_rate: float = 1.0
    plain_rates: deque[float] = field(default_factory=lambda: deque([1.0], maxlen=NUM_PLAIN_SAMPLES))
    measured: float = 1.0
    predicted: float = 1.0
    num_measured: int = PRIOR_STEPS

    def add_plain(self, rate: float) -> None:
        """Add the measured rate of a plain step. The median is robust against disturbed steps."""
        self.plain_rates.append(rate)
        ordered = sorted(self.plain_rates)
        self.plain_rate = ordered[len(ordered) // 2]

    def add_speculative(self, measured: float, predicted: float) -> None:
        """Add the measured and the predicted rate of a speculative step."""
        self.num_measured += 1
        weight = max(RATE_WEIGHT, 1 / self.num_measured)
        self.measured += weight * (measured - self.measured)
        self.predicted += weight * (predicted - self.predicted)

    def begin_pause(self) -> None:
        """Pause the heads: briefly after many speculative steps, else for longer than the last time."""
        self.pause = MIN_PAUSE if self.num_on > self.pause else min(2 * self.pause, MAX_PAUSE)
        self.is_speculating, self.num_paused, self.num_on = False, self.pause, 0
        # Measurements of speculation age while there are no new ones: they may be of a disturbed machine.
        self.measured += FORGETTING * (self.predicted - self.measured)

    def weigh(self, gain: float) -> None:
        """Update the mean gain with the log ratio of the two rates, and change the mode if that pays."""
        if self.is_speculating:
            self.num_on += 1
            self.gain += NEWEST_WEIGHT * (gain - self.gain)
            if self.gain < -GAIN_MARGIN:
                self.begin_pause()
        elif gain > STARTING_GAIN:
            self.is_speculating, self.gain = True, gain
            self.trial_interval = self.num_until_trial = MIN_TRIAL_INTERVAL
        elif self.pause == MAX_PAUSE and gain > -UNCERTAINTY * math.sqrt(PRIOR_STEPS / self.num_measured):
            # Speculate for one or two steps, to measure the predicted rate.
            self.is_speculating, self.gain = True, 0.0
        else:
            self.begin_pause()


class DraftBudget:
    """Chooses the number of draft tokens of each step.

    For each step call ``is_resting``. If it is False, call ``begin``, then ``choose`` if draft tokens are considered,
    then ``observe``. The caller passes the BudgetChoice from one call to the next.
    """

    def __init__(self, costs: StepCosts, max_draft_tokens: int) -> None:
        """``max_draft_tokens``: the maximum of a step, for all requests together."""
        self.costs, self.max_draft_tokens = costs, max_draft_tokens
        self._loads: dict[int, _LoadState] = {}
        self._last: _LoadState | None = None  # of the last step
        self._num_chosen = 0  # draft tokens of the last step that considered any
        self._correction = AcceptanceRateCorrection()  # of all requests together

    def is_resting(self, num_running: int) -> bool:
        """Return whether the next step decodes plainly and is not measured either, as most steps of a pause.

        ``num_running``: running requests. Call ``begin`` if not."""
        load = self._loads.get(_load_of(num_running))
        if load is not self._last or load is None or load.is_speculating or load.num_paused <= MEASURED_INTERVAL:
            return False
        if load.num_paused % MEASURED_INTERVAL == 0:
            return False
        load.num_paused -= 1
        return True

    def begin(
        self,
        num_requests: int,
        num_prompt_rows: int,
        num_context_tokens: int = 0,
        is_urgent: bool = False,
        num_prefilling: int = 0,
    ) -> BudgetChoice:
        """Return whether draft tokens are considered in a step and whether the heads run.

        ``num_requests`` requests decode beside ``num_prompt_rows``; ``num_context_tokens``: their committed tokens;
        ``is_urgent``: one of them is behind its latency target. ``num_prefilling`` requests have uncomputed prompt
        tokens; they count for the load, which a prompt must not change for the steps that it takes."""
        choice = BudgetChoice(
            num_requests=num_requests,
            num_running=num_requests + num_prefilling,
            num_prompt_rows=num_prompt_rows,
            num_context_tokens=num_context_tokens,
            is_urgent=is_urgent,
        )
        load = self._state(choice.num_running)
        if not num_requests:
            choice.wants_heads = load.is_speculating or load.num_paused <= 0
            return choice
        choice.predicted_seconds = self.costs.plain(num_requests, num_context_tokens)
        if num_prompt_rows:
            rows = np.array([num_prompt_rows])
            choice.predicted_seconds = float(self.costs.prefilling(num_requests, rows, num_context_tokens)[0])
        if load.is_speculating:
            is_trial = self._is_trial(load, choice)
            choice.considers_drafts = not is_trial
            choice.wants_heads = not is_trial or is_urgent
        else:
            load.num_paused -= 1
            choice.considers_drafts = load.num_paused < 0
            choice.wants_heads = load.num_paused <= 0
        if is_urgent:
            choice.considers_drafts = choice.wants_heads = True
        return choice

    def max_proposed(self, choice: BudgetChoice) -> int:
        """Return how many draft tokens to propose to ``choose``. The host spends time on rejected proposals too."""
        return min(self.max_draft_tokens, max(MIN_PROPOSED, 2 * choice.num_requests, 2 * self._num_chosen))

    def choose(self, choice: BudgetChoice, acceptance_probability: np.ndarray) -> int:
        """Return how many draft tokens to verify, likeliest first, and record the decision in ``choice``.

        ``acceptance_probability`` float32 [N], in decreasing order: of each draft token, times the value of its
        request's tokens.
        """
        num_requests, costs = choice.num_requests, self.costs
        probability = acceptance_probability
        if not choice.is_urgent:
            probability = np.minimum(acceptance_probability * self._correction.factor, 1.0)
        num_tokens = num_requests + np.concatenate([[0.0], np.cumsum(probability, dtype=np.float64)])
        seconds, is_allowed = self._step_seconds(choice, len(num_tokens))
        rates = np.where(is_allowed, num_tokens / seconds, 0.0)
        best = self._num_chosen = int(rates.argmax())
        choice.num_draft_tokens, choice.num_proposed_tokens = best, len(acceptance_probability)
        choice.expected_accepted_tokens = float(num_tokens[best]) - num_requests
        choice.predicted_seconds += float(seconds[best]) - costs.plain(num_requests, choice.num_context_tokens)
        choice.predicted_rate = float(rates[best]) * self._unit(choice) / num_requests
        if not choice.is_urgent:
            load = self._state(choice.num_running)
            gain = math.log(choice.predicted_rate * load.measured / load.predicted / load.plain_rate)
            # If no draft token is chosen, the gain does not include the host's time for proposing them.
            load.weigh(gain if best else min(gain, -2 * GAIN_MARGIN))
            choice.wants_heads = load.is_speculating
        return best

    def observe(self, choice: BudgetChoice, seconds: float, num_accepted: int) -> None:
        """Learn from the measured ``seconds`` of a step and the number of its accepted draft tokens."""
        if choice.num_draft_tokens > 0 and not choice.is_urgent:
            expected = choice.expected_accepted_tokens / self._correction.factor
            self._correction.learn(num_accepted, expected)
        if not choice.num_requests or choice.num_prompt_rows or not choice.predicted_seconds:
            return
        if not (choice.considers_drafts or not choice.wants_heads):
            return  # heads without draft tokens: neither mode
        load, rate = self._state(choice.num_running), self._unit(choice) / seconds
        # The floor limits the effect of a disturbed step.
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
            # Prompt rows take the same time with or without draft tokens, so they must not count against these.
            seconds += costs.speculating(num_requests, np.zeros(1), choice.num_context_tokens)[0] - seconds[0]
        if not costs.profile.is_padded:
            return seconds, _is_edge(num_requests + extra)
        return seconds, True if has_prompts else costs.are_full(num_requests, extra)

    def _unit(self, choice: BudgetChoice) -> float:
        """Return the profiled seconds of a plain step.

        Multiplied by tokens per second per request, it gives a rate relative to plain decoding."""
        return self.costs.profiled_plain(choice.num_requests, choice.num_context_tokens)

    def _is_trial(self, load: _LoadState, choice: BudgetChoice) -> bool:
        """Return whether this step of a speculating load tries plain decoding."""
        if choice.num_prompt_rows or choice.is_urgent:
            return False
        load.num_until_trial -= 1
        if load.num_until_trial >= 0:
            return False
        if load.num_until_trial <= -TRIAL_STEPS:
            load.trial_interval = min(2 * load.trial_interval, MAX_TRIAL_INTERVAL)
            load.num_until_trial = load.trial_interval
        return True

    def _state(self, num_running: int) -> _LoadState:
        """Return the state of a load. A change of load shortens its pause."""
        state = self._loads.get(load := _load_of(num_running))
        if state is None:
            state = self._loads[load] = _LoadState()
        if state is not self._last:
            self._last = state
            state.num_paused = min(state.num_paused, MIN_PAUSE)
        return state


def _load_of(num_running: int) -> int:
    """Return the number of a load, which spans half an octave of running requests."""
    return int(2 * math.log2(max(num_running, 1)))


def _is_edge(rows: np.ndarray) -> np.ndarray:
    """Return which of ``rows`` int [N] may be the size of a step, bool [N].

    There are eight sizes in each doubling, so that recorded steps can be reused. The first is always allowed."""
    granularity = np.maximum(1, 2 ** np.floor(np.log2(rows / 8))).astype(np.int64)
    is_allowed = rows % granularity == 0
    is_allowed[0] = True
    return is_allowed
