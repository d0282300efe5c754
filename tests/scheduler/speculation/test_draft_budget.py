"""How many guesses pay: against brute force, over time, and what steps are thought to cost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from euryale.scheduler.speculation.draft_budget import DraftBudget
from euryale.scheduler.step_cost import Profile, StepCosts


def profile(**changes) -> Profile:
    """A step of 1 ms, of which a quarter again for heads and 0.1 ms a row."""
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
        profile=profile(steps=steps, extra=[0, 7, 11], speculating=[[2e-3, 3e-3, 4e-3], [4e-3, 4e-3, 5e-3]]),
    )
    acceptance_probability = sorted(acceptance_probability, reverse=True)
    budget = DraftBudget(costs, most=100)
    assert budget.begin(requests, num_prompt_rows)
    rates = {}
    for n in range(len(acceptance_probability) + 1):
        rows = requests + num_prompt_rows + n
        # Sizes that steps may have, up to 31 rows: any at first, then every second; where steps are padded, full ones.
        padded = {0, 7 if requests == 1 else 4, 11 if requests == 1 else 0}
        if n == 0 or (num_prompt_rows or n in padded if steps else rows < 16 or rows % 2 == 0):
            # Prompts take their time in any case, however long that is: guesses are weighed as if without them.
            with_them, alone = (
                costs.speculating(requests, np.array([num_prompt_rows + more]), prompts=num_prompt_rows > 0)[0]
                for more in (n, 0)
            )
            seconds = (
                costs.speculating(requests, np.array([0]))[0] + with_them - alone if num_prompt_rows else with_them
            )
            rates[n] = (requests + sum(acceptance_probability[:n])) / seconds
    chosen = budget.choose(np.asarray(acceptance_probability, dtype=np.float32))
    assert chosen in rates
    assert rates[chosen] == pytest.approx(max(rates.values()), rel=1e-6)
    assert budget.last.expected_accepted_tokens == pytest.approx(
        sum(acceptance_probability[:chosen]), rel=1e-5, abs=1e-9
    )
    prompts = costs.prefilling(requests, np.array([num_prompt_rows]))[0] - costs.plain(requests)
    assert budget.last.predicted_seconds > prompts


def test_heads_rest_where_guesses_do_not_pay_and_are_asked_again_now_and_then():
    budget = DraftBudget(StepCosts(profile()), most=10)
    useless, steps_on = np.full(4, 0.01, dtype=np.float32), []
    for step in range(400):
        if budget.begin(1, 0):
            assert budget.choose(useless) == 0
            steps_on.append(step)
        budget.wants_heads()
    assert steps_on[:3] == [0, 17, 50], "the first step, then after pauses of 16 and 32"
    assert len(steps_on) < 8
    while not budget.begin(1, 0):
        pass
    assert budget.choose(np.full(4, 0.9, dtype=np.float32)) == 4
    assert budget.wants_heads()
    assert budget.begin(1, 0)


def test_heads_rest_though_they_seem_to_cost_nothing():
    """A profile may say so by its noise."""
    budget, looked = DraftBudget(StepCosts(profile(speculating=[[1e-3, 3e-3], [2e-3, 4e-3]])), most=10), 0
    for _ in range(100):
        if budget.begin(8, 0):
            looked += 1
            assert budget.choose(np.full(4, 0.01, dtype=np.float32)) == 0
        budget.wants_heads()
    assert looked < 10


def test_expectations_that_prove_too_low_are_raised():
    """The second guess does not pay as such; where more come true than expected, it does."""
    costs = StepCosts(profile(speculating=[[1.02e-3, 1.5e-3], [2.04e-3, 2.5e-3]], requests=[1, 2], extra=[0, 1]))
    for right, more in ((0.35, False), (1.0, True)):
        budget, rng, found = DraftBudget(costs, most=4), np.random.default_rng(0), []
        for _ in range(60):
            if budget.begin(1, 0):
                taken = budget.choose(np.asarray([0.6, 0.5], dtype=np.float32))
                budget.observe(budget.last.predicted_seconds, int((rng.random(taken) < right).sum()))
                found.append(taken)
        assert (max(found[-5:]) == 2) == more, found


def test_another_load_is_another_question():
    budget = DraftBudget(StepCosts(profile()), most=10)
    budget.begin(8, 0)
    budget.choose(np.full(4, 0.01, dtype=np.float32))
    assert not budget.wants_heads()
    assert not budget.begin(8, 0)
    assert not budget.begin(4, 0)
    assert budget.wants_heads()
    assert budget.begin(4, 0)


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
    stepped = StepCosts(profile(steps=True, extra=[0, 7, 11], speculating=[[2e-3, 3e-3, 4e-3], [4e-3, 4e-3, 6e-3]]))
    assert stepped.plain(2) == pytest.approx(2e-3), "padded to eight requests"
    np.testing.assert_allclose(stepped.speculating(1, np.array([0, 1, 7, 8])), [2e-3, 3e-3, 3e-3, 4e-3])
    np.testing.assert_allclose(stepped.speculating(8, np.array([0, 1, 4])), [4e-3, 6e-3, 6e-3])
    assert stepped.speculating(8, np.array([2]), prompts=True)[0] == pytest.approx(5e-3), "not padded"
    assert stepped.are_full(5, np.arange(6)).tolist() == [True, False, False, False, True, False]
    far = StepCosts(profile(per_token=1e-6))
    assert far.plain(1, context=500) == pytest.approx(1.5e-3)


def test_prompts_do_not_make_guesses_look_cheap():
    """They take their time in any case: a guess that costs more than its token elsewhere is none for such a step."""
    costs = StepCosts(profile(requests=[8], plain=[2e-3], extra=[0, 100], speculating=[[2e-3, 32e-3]]))
    for num_prompt_rows in (0, 50):  # a step of 2 or of 17 ms, and 0.3 ms for each guess
        budget = DraftBudget(costs, most=100)
        budget.begin(8, num_prompt_rows)
        assert budget.choose(np.full(32, 0.9, dtype=np.float32)) == 0, "8 tokens in 2 ms; 3 more in each further 1"


def test_more_guesses_are_looked_for_while_they_pay():
    budget, found = DraftBudget(StepCosts(profile(speculating=[[1.25e-3, 1.3e-3], [2.5e-3, 2.6e-3]])), most=200), []
    for _ in range(4):
        assert budget.begin(1, 0)
        found.append(budget.reach())
        budget.choose(np.full(budget.reach(), 0.5, dtype=np.float32))
    assert found == [32, 62, 118, 200], "twice the guesses taken: 31 and 59 beside the root are sizes that steps have"
    budget.choose(np.zeros(200, dtype=np.float32))
    assert budget.reach() == 32


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
def test_a_profile_that_is_none_is_refused(changes):
    with pytest.raises(ValueError, match="profile"):
        profile(**changes)
