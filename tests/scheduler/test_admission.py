"""Who is let in and who gives way, case by case; test_batches.py has the rules in general."""

import dataclasses
from unittest.mock import patch

import numpy as np
from made_up_model import LIMITS, TREE, deepest, request, results

from euryale.scheduler.request import Request
from euryale.scheduler.scheduler import Scheduler
from euryale.scheduler.speculation.drafter import StaticDrafter
from euryale.scheduler.stats import EngineStats

ONE_SEAT = dataclasses.replace(LIMITS, max_num_seqs=1)


def step(scheduler: Scheduler, rng=None) -> list[Request]:
    """One step; returns who ran."""
    planned = scheduler.plan(1, 0)
    scheduler.advance(planned, results(planned, rng or np.random.default_rng(0)))
    return planned.requests


def run_all(scheduler: Scheduler) -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        if not scheduler.has_work:
            return
        step(scheduler, rng)
    raise AssertionError("it does not end")


def test_a_request_runs_on_the_pages_of_its_known_tokens():
    scheduler = Scheduler(LIMITS, None)
    many = [request(key, 5, first=key + 10, max_tokens=30) for key in range(4)]  # nine pages each in the end, of 20
    for made in many:
        scheduler.add(made)
    assert step(scheduler)[:2] == many[:2]
    assert scheduler.admission.running == many
    run_all(scheduler)
    assert all(len(made.output) == 30 for made in many)
    assert [made.num_preempted > 0 for made in many] == [False, False, True, True]  # the first ones let in go on


def test_of_two_requests_that_need_most_of_the_pages_each_comes_to_its_end():
    for bound in (0, 1, 3, 1000):
        scheduler = Scheduler(dataclasses.replace(LIMITS, num_pages=10), None, starvation_bound=bound)
        two = [request(key, 10, first=key + 10, max_tokens=28, priority=key) for key in range(2)]  # ten pages each
        for made in two:
            scheduler.add(made)
        run_all(scheduler)
        assert [len(made.output) for made in two] == [28, 28]
        assert two[0].num_preempted == 0
        assert 0 < two[1].num_preempted <= max(bound, 1)  # a preempted request waits for a step at least


def test_drafts_give_way_before_anybody_is_preempted():
    """Of seven pages two requests need six, and the drafts of the first would like to have the seventh for good."""
    limits = dataclasses.replace(LIMITS, num_pages=7, max_num_batched_tokens=40)
    scheduler = Scheduler(limits, StaticDrafter(TREE))
    for key, length in ((0, 11), (1, 9)):
        scheduler.add(request(key, length, first=key + 10, max_tokens=12))
    step(scheduler)
    depths = []
    for _ in range(4):
        planned = scheduler.plan(1, 0)
        depths.append([deepest(segment) for segment in planned.plan.segments])
        found = results(planned, np.random.default_rng(0))
        found = [dataclasses.replace(f, tokens=f.tokens[-1:], accepted_nodes=[]) for f in found]  # none is accepted
        scheduler.advance(planned, found)
    first, second = scheduler.admission.running[0], scheduler.admission.waiting.first
    # A page holds four tokens. In the end the second lacks one for its own and leaves all that it had.
    assert depths == [[3, 2], [3, 1], [2, 0], [3]]
    assert (first.num_known, second.num_known) == (16, 13)
    assert (first.num_preempted, second.num_preempted) == (0, 1)


def test_a_better_priority_passes_those_that_wait_and_preempts_one_that_runs():
    scheduler = Scheduler(ONE_SEAT, None)
    usual, other, urgent = (
        request(key, 5, first=key + 10, max_tokens=8, priority=p) for key, p in ((0, 1), (1, 1), (2, 0))
    )
    scheduler.add(usual)
    step(scheduler)
    scheduler.add(other)
    scheduler.add(urgent)
    assert [step(scheduler) for _ in range(8)] == [[urgent]] * 8
    assert (usual.num_preempted, len(usual.output)) == (1, 1)
    assert step(scheduler) == [usual]  # it came before the other
    run_all(scheduler)
    values = EngineStats(scheduler).values()
    assert (values["preemptions_for_priority"], values["preemptions_for_pages"]) == (1, 0)
    assert values["recomputed_tokens"] == 1  # five tokens were computed, of which four fill a page that was kept
    assert values["prompt_tokens_admitted"] == 15


def test_a_request_is_passed_for_as_long_as_the_bound_says_and_no_longer():
    for bound in (1, 7, 20):
        scheduler = Scheduler(ONE_SEAT, None, starvation_bound=bound)
        patient = request(0, 5, max_tokens=9, priority=5)
        scheduler.add(patient)
        for key in range(1, 30):
            scheduler.add(request(key, 1, max_tokens=1))  # a better one for every step
        ran = [step(scheduler)[0] for _ in range(bound + 9)]
        assert [r is patient for r in ran] == [False] * bound + [True] * 9
        assert patient.num_waited == bound
        assert patient.finish_reason
        assert patient.num_preempted == 0


def test_the_bound_counts_all_steps_of_waiting_and_then_nothing_preempts():
    scheduler = Scheduler(ONE_SEAT, None, starvation_bound=4)
    patient = request(0, 5, max_tokens=9, priority=5)
    scheduler.add(patient)
    ran = []
    for key in range(1, 30):
        if key % 2 == 0:
            scheduler.add(request(key, 1, max_tokens=1))
        if scheduler.has_work:
            ran += step(scheduler)
        if patient.finish_reason:
            break
    # Every other step belongs to another until the patient one has waited four times.
    assert [r is patient for r in ran] == [True, False] * 4 + [True] * 5
    assert patient.num_preempted == 4


def test_cancelling_a_preempted_request_frees_what_waits_for_it():
    scheduler = Scheduler(ONE_SEAT, None)
    usual, urgent = request(0, 9, max_tokens=8, priority=1), request(1, 9, first=8, max_tokens=8)
    scheduler.add(usual)
    step(scheduler)
    scheduler.add(urgent)
    step(scheduler)
    assert scheduler.cancel(usual.key) is usual
    assert scheduler.cancel(usual.key) is None
    assert usual.pages == []
    run_all(scheduler)
    assert scheduler.admission.pages.num_free == LIMITS.num_pages
    assert EngineStats(scheduler).values()["recomputed_tokens"] == 0


def test_a_step_looks_at_few_of_those_that_wait():
    """Thousands that wait, for pages, for a seat, or for a prefix that is under way."""
    for seats, first in ((1, None), (8, None), (8, 7)):
        limits = dataclasses.replace(LIMITS, max_num_seqs=seats, max_num_batched_tokens=8)
        scheduler = Scheduler(limits, None)
        for key in range(3000):
            scheduler.add(request(key, 25, first=first or key % 50, max_tokens=5))
        for _ in range(20):
            with patch.object(
                scheduler.admission, "_hash_known", side_effect=scheduler.admission._hash_known
            ) as looked:
                step(scheduler)
            assert looked.call_count <= seats
        assert len(scheduler.admission.waiting) > 2900
