"""The scheduler under random arrivals, cancellations and steps, with a scripted model: its rules always hold.

``pytest --hypothesis-profile nightly`` runs twenty times as many operations.
"""

import dataclasses
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from made_up_model import LIMITS, TREE, deepest, request, results

from euryale.scheduler.request import FinishReason, Request
from euryale.scheduler.scheduler import Scheduler
from euryale.scheduler.speculation.draft_budget import DraftBudget
from euryale.scheduler.speculation.drafter import StaticDrafter
from euryale.scheduler.speculation.dynamic_drafter import DynamicDrafter
from euryale.scheduler.step_cost import Profile, StepCosts

FEW = dataclasses.replace(LIMITS, num_pages=16)  # two large requests do not fit together
SIZE, BOUND, MAX_PER_REQUEST = FEW.page_size, 12, 9
COSTS = Profile(requests=[1, 4], plain=[1.0, 1.2], extra=[0, 8], speculating=[[1.1, 1.6], [1.4, 2.2]])
DRAFTERS = {
    "static": lambda costs: StaticDrafter(TREE),
    "dynamic": lambda costs: DynamicDrafter(3, MAX_PER_REQUEST),
    "dynamic with a budget": lambda costs: DynamicDrafter(3, MAX_PER_REQUEST, DraftBudget(costs, max_draft_tokens=10)),
}


class Batches(RuleBasedStateMachine):
    """Counts waits, order and contents of pages independently of the scheduler, from its plans."""

    seen: ClassVar[Counter] = Counter()  # in all runs

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)
        self.all, self.ended, self.emitted = {}, {}, {}
        self.contents = {}  # slot -> the token whose K/V it holds
        self.waits, self.aged = Counter(), {}  # steps waited; the plan before which the bound was reached

    @initialize(drafts=st.sampled_from(sorted(DRAFTERS)), longest=st.sampled_from([0.0, 1.3]))
    def start(self, drafts, longest):
        costs = StepCosts(COSTS)
        drafter = DRAFTERS[drafts](costs)
        self.scheduler = Scheduler(FEW, drafter, starvation_bound=BOUND, costs=costs, max_prefill_seconds=longest)
        self.admission = self.scheduler.admission
        self.seen[drafts] += 1

    @rule(
        length=st.integers(1, 30),
        first=st.integers(7, 8),
        max_tokens=st.integers(1, 30),
        speculation=st.booleans(),
        priority=st.integers(-1, 1),
    )
    def add(self, length, first, max_tokens, speculation, priority):
        key = len(self.all)
        new = request(key, length, first, max_tokens=max_tokens, speculation=speculation, priority=priority)
        self.scheduler.add(new)
        self.all[key], self.emitted[key] = new, []
        self.seen["operations"] += 1

    @precondition(lambda self: len(self.all) > len(self.ended))
    @rule(data=st.data())
    def cancel(self, data):
        preempted = [r.key for r in self.admission.waiting if r.num_preempted]
        key = data.draw(st.sampled_from(sorted(self.all) + len(self.all) * preempted))  # rare, so they come often
        self.seen["cancelled preempted"] += self.admission.waiting.find(key) is not None and self.all[key].num_preempted
        found = self.scheduler.cancel(key)
        assert (found is None) == (key in self.ended)
        if found:
            self.ended[key] = FinishReason.CANCELLED
        self.seen["operations"] += 1

    @rule(token=st.sampled_from([9, 9, 9, 9, 9, 2]))
    def step(self, token):
        self.take_step(token)
        self.seen["operations"] += 1

    def take_step(self, token):
        for waiting in self.admission.waiting:
            if self.waits[waiting.key] == BOUND:
                self.aged.setdefault(waiting.key, self.scheduler.num_steps)
        before = Before(self.admission)
        planned = self.scheduler.plan(1, 0)
        self.check_who_runs(before)
        self.waits.update(r.key for r in self.admission.waiting)
        assert planned.plan.num_rows <= FEW.max_num_batched_tokens
        assert all(segment.num_draft_tokens <= MAX_PER_REQUEST for segment in planned.plan.segments)
        self.seen["draft steps"] += any(segment.num_draft_tokens for segment in planned.plan.segments)
        assert len(planned.plan.segments) > 0 or not self.scheduler.has_work, "no request makes progress"
        found = results(planned, self.rng, token)
        self.write(planned, found)
        step = self.scheduler.advance(planned, found)
        self.scheduler.observe(step, self.rng.uniform(1e-3, 3e-3))
        for output in step.outputs:
            key = output.key
            assert key not in self.ended
            self.emitted[key] += output.tokens
            if output.finish_reason:
                self.ended[key] = output.finish_reason

    # ---- who runs

    def check_who_runs(self, before):
        running, waiting = self.admission.running, list(self.admission.waiting)
        admitted = [r for r in running if r not in before.running]
        preempted = [r for r in waiting if r.num_preempted > before.times[r.key]]
        assert set(before.running) - set(preempted) <= set(running)
        assert len(running) <= FEW.max_num_seqs
        for r in [*running, *waiting]:
            assert (r.aged_since is not None) == (r.key in self.aged), "the bound is counted wrongly"
        self.check_preempted(before, admitted, preempted)
        for late in admitted:
            for overtaken in waiting:
                if overtaken not in preempted and self.turn(overtaken) < self.turn(late):
                    assert before.keeps_waiting(overtaken, running), "overtaken for no reason"
        self.seen["admitted aged"] += any(r.key in self.aged for r in admitted)
        self.seen["found pages"] += any(r.num_computed > 0 for r in admitted)

    def turn(self, r: Request):
        return (0, self.aged[r.key], r.key) if r.key in self.aged else (1, r.params.priority, r.key)

    def check_preempted(self, before, admitted, preempted):
        for_pages = self.admission.num_preempted_for_pages - before.counts[0]
        assert len(preempted) == for_pages + self.admission.num_preempted_for_priority - before.counts[1]
        self.seen["preempted for pages"] += for_pages
        self.seen["preempted for priority"] += len(preempted) - for_pages
        for victim in preempted:
            assert not before.protected[victim.key], "preempted again though aged"
            assert victim.num_preempted == before.times[victim.key] + 1
            assert victim.pages == []
            assert victim.num_computed == 0
            self.seen["preempted aged"] += victim.key in self.aged
            for other in before.running:
                if (
                    other not in preempted
                    and not before.protected[other.key]
                    and (for_pages or other.key not in self.aged)
                ):
                    assert before.victim_order(victim, self.aged) > before.victim_order(other, self.aged)
        if for_pages:
            assert not admitted, "admitted though pages are short"
            assert before.lacks_pages, "preempted though there are pages: by speculation?"
        elif preempted:
            best = min(r.params.priority for r in admitted)
            assert all(r.params.priority > best and r.key not in self.aged for r in preempted)

    # ---- pages

    def write(self, planned, found):
        """Check that a step reads what the request's earlier tokens wrote, and that it writes to its own pages only."""
        found = iter(found)
        for made, segment in zip(planned.requests, planned.plan.segments, strict=True):
            assert all(0 <= p <= i for i, p in enumerate(segment.parents)), "not closed under ancestors"
            slots = [page * SIZE + at for page in segment.pages.tolist() for at in range(SIZE)]
            seen = [self.contents[slot] for slot in slots[: segment.context]]
            assert seen == made.known_tokens(0, segment.context).tolist()
            computed = segment.tokens[: segment.num_new_tokens].tolist()
            if segment.emits_tokens:
                computed += next(found).tokens[:-1]
            assert deepest(segment) <= max(made.num_remaining - 1, 0)
            room = slots[segment.context :]
            assert segment.num_new_tokens + deepest(segment) <= len(room), "a path that is committed needs pages"
            for slot, token in zip(room, computed, strict=False):
                assert self.admission.pages._holders[slot // SIZE] == 1, "written to a page that others read"
                self.contents[slot] = token

    @invariant()
    def pages_are_conserved(self):
        pool = self.admission.pages
        held = Counter(p for r in self.admission.running for p in r.pages)
        assert all(pool._holders[page] == count for page, count in held.items())
        assert len(held) + pool.num_free == FEW.num_pages
        assert not any(r.pages for r in self.admission.waiting)
        for r in self.admission.running:
            assert 0 <= r.num_computed < r.num_known
            assert r.page_ids[: len(r.pages)].tolist() == r.pages
            longest = len(r.prompt) + r.params.max_tokens if r.is_protected else r.num_known
            assert len(r.pages) <= pool.pages_for(longest), "speculation holds a page between steps"
            assert not r.is_protected or len(r.pages) == pool.pages_for(longest)

    def teardown(self):
        for _ in range(5000):
            if not self.scheduler.has_work:
                break
            self.take_step(9)
        assert not self.scheduler.has_work, "a request starved"
        assert self.admission.pages.num_free == FEW.num_pages
        assert not self.admission._pending
        assert set(self.ended) == set(self.all)
        for key, made in self.all.items():
            assert made.output == self.emitted[key]
            assert len(made.output) <= made.params.max_tokens
            assert made.finish_reason == self.ended[key]
            assert sum(made.tokens_per_step) == len(made.output)
            assert made.num_waited == self.waits[key]
            if not made.params.speculation:
                assert max(made.tokens_per_step, default=1) == 1


class Before:
    """The state before a step was planned."""

    def __init__(self, admission):
        pool = admission.pages
        self.running = list(admission.running)
        self.counts = admission.num_preempted_for_pages, admission.num_preempted_for_priority
        here = [*self.running, *admission.waiting]
        self.protected, self.times = {r.key: r.is_protected for r in here}, {r.key: r.num_preempted for r in here}
        self.computed = {r.key: r.num_computed for r in self.running}
        held = {page for r in self.running for page in r.pages}
        lacking = sum(max(pool.pages_for(r.num_known) - len(r.pages), 0) for r in self.running)
        self.lacks_pages = len(held) + lacking > FEW.num_pages

    def victim_order(self, r: Request, aged):
        """Return a key; requests with higher ones are preempted first."""
        place = self.running.index(r) if r in self.running else len(self.running)
        return r.key not in aged, r.params.priority, place

    def keeps_waiting(self, overtaken: Request, running):
        """Return whether a running request computes the page that the request would begin with."""
        for r in {*self.running, *running}:
            end = (self.computed.get(r.key, r.num_computed) // SIZE + 1) * SIZE
            if end < overtaken.num_known and r.known_tokens(0, end).tolist() == overtaken.known_tokens(0, end).tolist():
                return True
        return False


@pytest.mark.timeout(3600)  # of the nightly profile
def test_the_rules_hold_under_random_operations():
    Batches.seen.clear()
    most = settings.default.max_examples
    # The operations are always the same, except in the nightly profile, so that the counts below are reproducible.
    options = settings(stateful_step_count=75, deadline=None, derandomize=most <= 100)
    run_state_machine_as_test(Batches, settings=options)
    seen = Batches.seen
    assert seen["operations"] >= 50 * most >= 5000
    for name in ("for pages", "for priority", "aged"):
        assert seen[f"preempted {name}"] > 0, name
    assert min(seen[name] for name in DRAFTERS) > 10
    assert seen["draft steps"] > 500
    assert min(seen["found pages"], seen["admitted aged"], seen["cancelled preempted"]) > 0
