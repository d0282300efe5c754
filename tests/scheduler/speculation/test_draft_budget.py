"""The number of draft tokens: against brute force and over time; and the cost model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from euryale.scheduler.speculation.draft_budget import DraftBudget
from euryale.scheduler.step_cost import Profile, StepCosts


def profile(**changes) -> Profile:
    """Return a profile: 1 ms for a plain step, 0.25 ms more for the heads, 0.1 ms for each row."""
    fields = {
        "requests": [1, 8],
        "plain": [1e-3, 2e-3],
        "extra": [0, 10],
        "speculating": [[1.25e-3, 2.25e-3], [2.5e-3, 3.5e-3]],
    }
    return Profile(**fields | changes)


@given(
    requests=st.integers(1, 8),
    num_prompt_rows=st.integers(0, 5),
    acceptance_probability=st.lists(st.floats(0.001, 0.98), max_size=12),
    steps=st.booleans(),
    prompt_scale=st.sampled_from([0.1, 1.0, 1.3, 10.0]),
)
def test_the_choice_is_that_of_brute_force(requests, num_prompt_rows, acceptance_probability, steps, prompt_scale):
    costs = StepCosts(
        prompt_scale=prompt_scale,
        profile=profile(is_padded=steps, extra=[0, 7, 11], speculating=[[2e-3, 3e-3, 4e-3], [4e-3, 4e-3, 5e-3]]),
    )
    acceptance_probability = sorted(acceptance_probability, reverse=True)
    budget = DraftBudget(costs, max_draft_tokens=100)
    choice = budget.begin(requests, num_prompt_rows)
    assert choice.considers_drafts
    rates = {}
    for n in range(len(acceptance_probability) + 1):
        rows = requests + num_prompt_rows + n
        # Sizes that steps may have, up to 31 rows: any at first, then every second; where steps are padded, full ones.
        padded = {0, 7 if requests == 1 else 4, 11 if requests == 1 else 0}
        if n == 0 or (num_prompt_rows or n in padded if steps else rows < 16 or rows % 2 == 0):
            # Prompt rows take the same time in any case: draft tokens are judged as in a step without them.
            with_them, alone = (
                costs.speculating(requests, np.array([num_prompt_rows + more]), prompts=num_prompt_rows > 0)[0]
                for more in (n, 0)
            )
            seconds = (
                costs.speculating(requests, np.array([0]))[0] + with_them - alone if num_prompt_rows else with_them
            )
            rates[n] = (requests + sum(acceptance_probability[:n])) / seconds
    chosen = budget.choose(choice, np.asarray(acceptance_probability, dtype=np.float32))
    assert chosen in rates
    assert rates[chosen] == pytest.approx(max(rates.values()), rel=1e-6)
    assert choice.expected_accepted_tokens == pytest.approx(sum(acceptance_probability[:chosen]), rel=1e-5, abs=1e-9)
    plain = requests / costs.profiled_plain(requests)
    assert choice.predicted_rate == pytest.approx(rates[chosen] / plain, rel=1e-6), "over plain decoding as profiled"
    prompts = costs.prefilling(requests, np.array([num_prompt_rows]))[0] - costs.plain(requests)
    assert choice.predicted_seconds > prompts


def test_heads_pause_where_speculation_does_not_pay_and_are_tried_again():
    budget = DraftBudget(StepCosts(profile()), max_draft_tokens=10)
    useless, steps_on = np.full(4, 0.01, dtype=np.float32), []
    for step in range(400):
        choice = budget.begin(1, 0)
        if choice.considers_drafts:
            assert budget.choose(choice, useless) == 0
            steps_on.append(step)
    assert steps_on[:3] == [0, 17, 50], "the first step, then after pauses of 16 and 32"
    assert len(steps_on) < 8
    while not (choice := budget.begin(1, 0)).considers_drafts:
        pass
    assert budget.choose(choice, np.full(4, 0.9, dtype=np.float32)) == 4
    assert choice.wants_heads
    assert budget.begin(1, 0).considers_drafts


def test_heads_pause_even_if_profiled_without_cost():
    """A noisy profile may have heads without cost."""
    costs = StepCosts(profile(speculating=[[1e-3, 3e-3], [2e-3, 4e-3]]))
    budget, looked = DraftBudget(costs, max_draft_tokens=10), 0
    for _ in range(100):
        choice = budget.begin(8, 0)
        if choice.considers_drafts:
            looked += 1
            assert budget.choose(choice, np.full(4, 0.01, dtype=np.float32)) == 0
    assert looked < 10


def test_expectations_that_are_too_low_are_corrected():
    """The second draft token does not pay as predicted; it does if more are accepted than expected."""
    costs = StepCosts(profile(speculating=[[1.02e-3, 1.5e-3], [2.04e-3, 2.5e-3]], requests=[1, 2], extra=[0, 1]))
    for right, more in ((0.35, False), (1.0, True)):
        budget, rng, found = DraftBudget(costs, max_draft_tokens=4), np.random.default_rng(0), []
        for _ in range(60):
            choice = budget.begin(1, 0)
            if choice.considers_drafts:
                taken = budget.choose(choice, np.asarray([0.6, 0.5], dtype=np.float32))
                budget.observe(choice, choice.predicted_seconds, int((rng.random(taken) < right).sum()))
                found.append(taken)
        assert (max(found[-5:]) == 2) == more, found


class Machine:
    """Simulates steps that take ``plain_factor`` and ``draft_factor`` times as long as profiled."""

    def __init__(self, *, plain_factor: float = 1.0, draft_factor: float = 1.0, **changes) -> None:
        sizes = {"requests": [1, 8, 32], "plain": [1e-3, 2e-3, 4e-3], "extra": [0, 10]}
        sizes |= {"speculating": [[1.1e-3, 1.3e-3], [2.2e-3, 2.6e-3], [4.4e-3, 9e-3]]}
        self.truth = StepCosts(profile(**sizes | changes))
        self.budget = DraftBudget(StepCosts(profile(**sizes | changes)), max_draft_tokens=64)
        self.factors, self.rng = (plain_factor, draft_factor), np.random.default_rng(0)

    def run(self, num_requests: int, steps: int, acceptance: float) -> tuple[list[bool], float]:
        """Whether each step speculated, and how fast all were, in units of plain decoding."""
        found, tokens, seconds = [], 0, 0.0
        for _ in range(steps):
            if self.budget.is_resting(num_requests):
                found.append(False)
                tokens, seconds = tokens + num_requests, seconds + self.factors[0] * self.truth.plain(num_requests)
                continue
            choice, accepted = self.budget.begin(num_requests, 0), 0
            took = self.factors[0] * self.truth.plain(num_requests)
            if choice.considers_drafts:
                count = min(self.budget.max_proposed(choice), 2 * num_requests)
                taken = self.budget.choose(choice, np.full(count, acceptance, dtype=np.float32))
                accepted = int((self.rng.random(taken) < acceptance).sum())
                took = self.factors[1] * self.truth.speculating(num_requests, np.array([taken]))[0]
            took *= np.exp(0.1 * self.rng.standard_normal())  # step times vary
            self.budget.observe(choice, took, accepted)
            found.append(choice.considers_drafts)
            tokens, seconds = tokens + num_requests + accepted, seconds + took
        return found, tokens / seconds * self.factors[0] * self.truth.plain(num_requests) / num_requests


def test_measured_rates_overrule_a_profile_that_is_too_optimistic():
    """The profile predicts 1.3 times the tokens per second, but speculative steps take 1.5 times as long."""
    machine = Machine(draft_factor=1.5)
    machine.run(8, 300, 0.4)
    found, speed = machine.run(8, 2000, 0.4)
    assert np.mean(found) < 0.1
    assert speed > 0.97


def test_plain_steps_are_tried_while_speculating():
    """The profile has plain steps twice as long as they are, so that speculation seems to pay."""
    machine = Machine(plain_factor=0.5)
    found, _ = machine.run(8, 100, 0.4)
    assert np.mean(found[:40]) == 1
    machine.run(8, 300, 0.4)
    found, speed = machine.run(8, 2000, 0.4)
    assert np.mean(found) < 0.1
    assert speed > 0.97


def test_measured_rates_overrule_a_profile_that_is_too_pessimistic():
    """The profile predicts 0.9 times the tokens per second; speculation really has 1.4 times as many."""
    sizes = [[1.1e-3, 2.0e-3], [2.2e-3, 4.5e-3], [4.4e-3, 9e-3]]
    machine = Machine(draft_factor=0.6, speculating=sizes)
    machine.run(8, 6000, 0.5)
    found, speed = machine.run(8, 1000, 0.5)
    assert np.mean(found) > 0.9
    assert speed > 1.1


@pytest.mark.parametrize("acceptance_before", [0.0, 0.6])
def test_speculation_resumes_soon_when_the_load_falls(acceptance_before):
    """Whether or not speculation paid for a single request before."""
    machine = Machine()
    machine.run(1, 400, acceptance_before)
    found, _ = machine.run(32, 1000, 0.3)
    assert np.mean(found[100:]) < 0.1, "it does not pay there"
    found, _ = machine.run(1, 32, 0.7)
    assert found[-1]
    assert sum(found) > 8


def test_a_disturbed_time_is_forgotten():
    """Speculation pays, but its first steps were measured while the machine was slow."""
    machine = Machine()
    machine.factors = (1.0, 8.0)
    machine.run(8, 300, 0.4)
    machine.factors = (1.0, 1.0)
    machine.run(8, 6000, 0.4)
    found, speed = machine.run(8, 1000, 0.4)
    assert np.mean(found) > 0.9
    assert speed > 1.1


def test_one_of_eight_steps_of_a_long_pause_is_measured():
    machine = Machine()
    machine.run(8, 1000, 0.0)
    budget, resting = machine.budget, []
    assert not budget.is_resting(1), "another load"
    budget.begin(1, 0)
    budget.begin(8, 0)  # its pause has 16 steps left, this one included
    for _ in range(40):
        resting.append(budget.is_resting(8))
        if not resting[-1] and budget.begin(8, 0).considers_drafts:
            break
    assert resting == [True] * 7 + [False] * 9, "the end of a pause is measured whole"


def test_a_prompt_does_not_change_the_load():
    """Of 32 requests one has a prompt to compute. Draft tokens do not pay, which 31 requests alone would not know."""
    machine = Machine()
    machine.run(32, 1000, 0.0)
    considered = 0
    for _ in range(100):
        if not machine.budget.is_resting(32):
            choice = machine.budget.begin(31, 64, num_prefilling=1)
            considered += choice.considers_drafts
            if choice.considers_drafts:
                machine.budget.choose(choice, np.full(8, 0.01, dtype=np.float32))
    assert considered < 10, "a trial takes a few steps"


def test_costs_are_interpolated_and_monotone():
    costs = StepCosts(profile())
    assert costs.plain(1) == pytest.approx(1e-3)
    assert 1e-3 < costs.plain(3) < 2e-3
    assert costs.plain(100) == pytest.approx(2e-3)
    np.testing.assert_allclose(costs.speculating(1, np.array([0, 5, 10, 20])), [1.25e-3, 1.75e-3, 2.25e-3, 3.25e-3])
    np.testing.assert_allclose(costs.prefilling(1, np.array([0, 10])), [1e-3, 2e-3])
    noisy = StepCosts(profile(speculating=[[1.5e-3, 1.1e-3], [1.0e-3, 3e-3]]))
    for requests in (1, 3, 8):
        assert np.all(np.diff(noisy.speculating(requests, np.arange(12))) >= 0)
        assert noisy.speculating(requests, np.array([0]))[0] >= noisy.plain(requests)
    stepped = StepCosts(profile(is_padded=True, extra=[0, 7, 11], speculating=[[2e-3, 3e-3, 4e-3], [4e-3, 4e-3, 6e-3]]))
    assert stepped.plain(2) == pytest.approx(2e-3), "padded to eight requests"
    np.testing.assert_allclose(stepped.speculating(1, np.array([0, 1, 7, 8])), [2e-3, 3e-3, 3e-3, 4e-3])
    np.testing.assert_allclose(stepped.speculating(8, np.array([0, 1, 4])), [4e-3, 6e-3, 6e-3])
    assert stepped.speculating(8, np.array([2]), prompts=True)[0] == pytest.approx(5e-3), "not padded"
    assert stepped.are_full(5, np.arange(6)).tolist() == [True, False, False, False, True, False]
    far = StepCosts(profile(per_token=1e-6))
    assert far.plain(1, context=500) == pytest.approx(1.5e-3)


def test_prompts_do_not_make_draft_tokens_look_cheap():
    """Prompt rows take their time in any case: a draft token must pay as in a step without them."""
    costs = StepCosts(profile(requests=[8], plain=[2e-3], extra=[0, 100], speculating=[[2e-3, 32e-3]]))
    for num_prompt_rows in (0, 50):  # a step of 2 or of 17 ms, and 0.3 ms for each draft token
        budget = DraftBudget(costs, max_draft_tokens=100)
        choice = budget.begin(8, num_prompt_rows)
        taken = budget.choose(choice, np.full(32, 0.9, dtype=np.float32))
        assert taken == 0, "8 tokens in 2 ms; 3 more in each further 1"


def test_more_draft_tokens_are_proposed_while_they_pay():
    costs = StepCosts(profile(speculating=[[1.25e-3, 1.3e-3], [2.5e-3, 2.6e-3]]))
    budget, found = DraftBudget(costs, max_draft_tokens=200), []
    for _ in range(4):
        choice = budget.begin(1, 0)
        assert choice.considers_drafts
        found.append(budget.max_proposed(choice))
        budget.choose(choice, np.full(found[-1], 0.5, dtype=np.float32))
    assert found == [32, 62, 118, 200], "twice the number taken: 31 and 59 beside the root are sizes that steps have"
    budget.choose(choice, np.zeros(200, dtype=np.float32))
    assert budget.max_proposed(choice) == 32


def test_costs_learn_from_steps():
    costs = StepCosts(profile())
    for _ in range(200):
        costs.learn(costs.plain(1), 2e-3, 1, 0, False)  # everything takes twice as long
    assert costs.plain(1) == pytest.approx(2e-3, rel=0.05)
    assert costs.speculating(1, np.array([10]))[0] == pytest.approx(2 * 2.25e-3, rel=0.2)
    before = costs.plain(1)
    costs.learn(before, 100 * before, 1, 0, False)  # a disturbed step
    assert costs.plain(1) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"plain": [1e-3]},
        {"extra": [1, 10]},
        {"requests": [8, 1]},
        {"plain": [1e-3, 0.0]},
        {"speculating": [[1e-3, 1e-3]]},
    ],
)
def test_an_invalid_profile_is_refused(changes):
    with pytest.raises(ValueError, match="profile"):
        profile(**changes)
