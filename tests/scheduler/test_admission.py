"""Admission and preemption, case by case; test_batches.py tests the general rules."""

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
    """Run one step; return the requests that ran."""
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
    assert [made.num_preempted > 0 for made in many] == [False, False, True, True]  # the first admitted ones go on


def test_two_requests_that_each_need_most_pages_both_finish():
    for bound in (0, 1, 3, 1000):
        scheduler = Scheduler(dataclasses.replace(LIMITS, num_pages=10), None, starvation_bound=bound)
        two = [request(key, 10, first=key + 10, max_tokens=28, priority=key) for key in range(2)]  # ten pages each
        for made in two:
            scheduler.add(made)
        run_all(scheduler)
        assert [len(made.output) for made in two] == [28, 28]
        assert two[0].num_preempted == 0
        assert 0 < two[1].num_preempted <= max(bound, 1)  # a preempted request waits for a step at least


def test_draft_tokens_give_way_before_requests_are_preempted():
    """Two requests need six of seven pages, and the draft tokens of the first could use the seventh forever."""
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
    # A page holds four tokens. In the end the second request lacks a page and is preempted.
    assert depths == [[3, 2], [3, 1], [2, 0], [3]]
    assert (first.num_known, second.num_known) == (16, 13)
    assert (first.num_preempted, second.num_preempted) == (0, 1)


def test_a_higher_priority_overtakes_waiting_requests_and_preempts_a_running_one():
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
    assert values["recomputed_tokens"] == 1  # five tokens were computed, of which four fill a cached page
    assert values["prompt_tokens_admitted"] == 15


def test_a_request_is_overtaken_until_the_starvation_bound():
    for bound in (1, 7, 20):
        scheduler = Scheduler(ONE_SEAT, None, starvation_bound=bound)
        waiting = request(0, 5, max_tokens=9, priority=5)
        scheduler.add(waiting)
        for key in range(1, 30):
            scheduler.add(request(key, 1, max_tokens=1))  # one of higher priority for every step
        ran = [step(scheduler)[0] for _ in range(bound + 9)]
        assert [r is waiting for r in ran] == [False] * bound + [True] * 9
        assert waiting.num_waited == bound
        assert waiting.finish_reason
        assert waiting.num_preempted == 0


def test_an_aged_request_is_never_preempted_and_all_waiting_steps_count():
    scheduler = Scheduler(ONE_SEAT, None, starvation_bound=4)
    waiting = request(0, 5, max_tokens=9, priority=5)
    scheduler.add(waiting)
    ran = []
    for key in range(1, 30):
        if key % 2 == 0:
            scheduler.add(request(key, 1, max_tokens=1))
        if scheduler.has_work:
            ran += step(scheduler)
        if waiting.finish_reason:
            break
    # Every other step runs another request, until this one has waited four steps.
    assert [r is waiting for r in ran] == [True, False] * 4 + [True] * 5
    assert waiting.num_preempted == 4


def test_cancelling_a_preempted_request_wakes_those_that_wait_for_its_pages():
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


def test_a_step_visits_few_waiting_requests():
    """Thousands wait: for pages, for one of max_num_seqs places, or for a prefix that is being computed."""
    for max_num_seqs, first in ((1, None), (8, None), (8, 7)):
        limits = dataclasses.replace(LIMITS, max_num_seqs=max_num_seqs, max_num_batched_tokens=8)
        scheduler = Scheduler(limits, None)
        for key in range(3000):
            scheduler.add(request(key, 25, first=first or key % 50, max_tokens=5))
        for _ in range(20):
            with patch.object(
                scheduler.admission, "_hash_known", side_effect=scheduler.admission._hash_known
            ) as looked:
                step(scheduler)
            assert looked.call_count <= max_num_seqs
        assert len(scheduler.admission.waiting) > 2900
