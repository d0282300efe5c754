"""Which draft tokens requests get: sources switched off, isolation by salt, latency targets, paused heads."""

import numpy as np
import pytest
from made_up_model import LIMITS, TREE, request, results

from euryale.scheduler.page_pool import PageHasher
from euryale.scheduler.request import FinishReason, Request
from euryale.scheduler.scheduler import Scheduler
from euryale.scheduler.speculation.draft_budget import DraftBudget
from euryale.scheduler.speculation.drafter import NO_DRAFT, Drafts, RequestStepResult, StaticDrafter
from euryale.scheduler.speculation.dynamic_drafter import DynamicDrafter, Sources
from euryale.scheduler.step_cost import Profile, StepCosts
from euryale.scheduler.step_result import HeadCandidates
from euryale.scheduler.trace import record

SEQUENCES = [11, 12, 13, 14, 15, 16, 17, 18]


def without_heads(key: int, output: list[int], **params) -> Request:
    made = request(key, 1, first=11, max_tokens=100, **params)
    made.output = list(output)
    return made


def take(drafter, made: Request, tokens: list[int], ends: bool = False) -> None:
    """A step of 10 ms emits ``tokens``."""
    made.output += tokens
    made.finish_reason = FinishReason.LENGTH if ends else None
    drafts, found = Drafts(trees=[NO_DRAFT], wants_heads=True), [RequestStepResult(made, tokens, [])]
    drafter.learn(drafts, found)
    drafter.observe(drafts, found, 0.01)


def proposed(drafter, made: Request, room: int = 6) -> list[int]:
    return drafter.draft([made], lambda: [8], room).trees[0].tokens[1:].tolist()


@pytest.mark.parametrize(
    ("sources", "own", "from_others"),
    [
        (Sources(), True, True),
        (Sources(traffic=False), True, False),
        (Sources(context=False), False, True),
        (Sources(traffic=False, context=False), False, False),
    ],
)
def test_sources_can_be_switched_off(sources, own, from_others):
    """The heads did not run, so all draft tokens come from n-grams."""
    drafter = DynamicDrafter(3, 6, sources=sources)
    first = without_heads(0, [])
    take(drafter, first, SEQUENCES[1:])
    take(drafter, first, SEQUENCES[:2])
    assert (proposed(drafter, first)[:3] == [13, 14, 15]) == own
    take(drafter, first, [19], ends=True)
    second = without_heads(1, [])
    take(drafter, second, [12])
    assert (13 in proposed(drafter, second)) == from_others


def test_requests_learn_from_others_of_their_salt_only():
    drafter = DynamicDrafter(3, 6)
    secret = without_heads(0, [], cache_salt="mine")
    take(drafter, secret, SEQUENCES[1:], ends=True)
    for salt, knows in (("", False), ("theirs", False), ("mine", True)):
        other = without_heads(len(salt) + 1, [], cache_salt=salt)
        take(drafter, other, [12])
        assert (13 in proposed(drafter, other)) == knows, salt


def test_a_reused_key_does_not_find_the_tokens_of_its_predecessor():
    drafter = DynamicDrafter(3, 6, sources=Sources(traffic=False))
    for turn in range(2):
        made = without_heads(7, [])
        take(drafter, made, SEQUENCES[1:])
        take(drafter, made, SEQUENCES[:2])
        assert proposed(drafter, made)[:3] == [13, 14, 15]
        again = without_heads(7, [])
        take(drafter, again, [12])
        assert 13 not in proposed(drafter, again), turn


def test_a_step_with_prompts_only_does_not_count_as_decoding():
    profile = Profile(requests=[1], plain=[1e-3], extra=[0, 60], speculating=[[1e-3, 1.5e-3]])
    costs = StepCosts(profile)
    scheduler = Scheduler(LIMITS, DynamicDrafter(3, 6, DraftBudget(costs, max_draft_tokens=8)), costs=costs)
    scheduler.add(request(0, 3, max_tokens=4))
    rng = np.random.default_rng(0)
    while scheduler.has_work:
        planned = scheduler.plan(1, 0)
        scheduler.observe(scheduler.advance(planned, results(planned, rng)), 1e-3)
    scale = costs.scale
    scheduler.add(request(1, 50, max_tokens=4))
    planned = scheduler.plan(1, 0)
    assert not planned.plan.segments[0].emits_tokens
    step = scheduler.advance(planned, results(planned, rng))
    scheduler.observe(step, 5e-3)
    assert costs.scale == scale
    assert record(scheduler, step, 0.0)["predicted_seconds"] is None
    assert record(scheduler, step, 0.0)["expected_accepted_tokens"] is None


def test_a_latency_target_without_speculation_does_not_run_the_heads():
    dear = Profile(requests=[1], plain=[1e-3], extra=[0, 1, 8], speculating=[[1.1e-3, 2.0e-3, 9e-3]])
    budget = DraftBudget(StepCosts(dear), max_draft_tokens=8)
    scheduler, rng, asked = Scheduler(LIMITS, DynamicDrafter(3, 6, budget)), np.random.default_rng(0), 0
    scheduler.add(request(0, 3, max_tokens=50, latency_target=0.01, speculation=False))
    scheduler.add(request(1, 3, max_tokens=50))
    for _ in range(40):
        planned = scheduler.plan(1, 0)
        asked += any(segment.wants_head_candidates for segment in planned.plan.segments)
        scheduler.observe(scheduler.advance(planned, results(planned, rng)), 1e-3)
    assert 0 < asked < 10


def test_page_hashes_are_equal_within_a_salt_only():
    hasher, found = PageHasher(4), {}
    for salt in ("", "a", "b"):
        found[salt] = []
        hasher.extend(found[salt], np.arange(8, dtype=np.int32), salt)
    assert len({name for chain in found.values() for name in chain}) == 6
    again: list[bytes] = []
    hasher.extend(again, np.arange(8, dtype=np.int32), "a")
    assert again == found["a"]


def test_draft_tokens_go_first_to_requests_behind_their_target():
    """Two requests have the same head candidates, and there are rows for three draft tokens."""
    ids = np.arange(20, 32, dtype=np.int32).reshape(3, 4)
    candidates = HeadCandidates(ids, np.tile(np.asarray([3, 1, 0, -1], dtype=np.float32), (3, 1)))
    drafter = DynamicDrafter(3, 6, sources=Sources(traffic=False, context=False))
    relaxed, behind = (without_heads(key, [], latency_target=target) for key, target in ((0, 0.0), (1, 5.0)))
    for made in (relaxed, behind):
        take(drafter, made, [12])
        made.head_candidates = candidates
    assert [len(d.parents) for d in drafter.draft([relaxed, behind], lambda: [8, 8], 4).trees] == [2, 2]
    take(drafter, behind, [12])  # 10 ms for a token that should take 5
    drafts = [len(d.parents) for d in drafter.draft([relaxed, behind], lambda: [8, 8], 4).trees]
    assert drafts[1] > drafts[0]


def test_an_urgent_request_gets_draft_tokens_where_others_do_not_pay():
    """A draft token costs four times as much as it yields."""
    dear = Profile(requests=[1], plain=[1e-3], extra=[0, 1, 8], speculating=[[1.1e-3, 2.0e-3, 9e-3]])
    for target, pays in ((0.0, False), (0.5, True)):
        scheduler = Scheduler(LIMITS, DynamicDrafter(3, 6, DraftBudget(StepCosts(dear), max_draft_tokens=8)))
        scheduler.add(request(0, 3, max_tokens=30, latency_target=target))
        rng, drafts = np.random.default_rng(0), []
        for _ in range(20):
            planned = scheduler.plan(1, 0)
            drafts.append(planned.plan.segments[0].num_draft_tokens)
            found = results(planned, rng)
            found = [type(f)(tokens=f.tokens[-1:], accepted_nodes=[], head_candidates=f.head_candidates) for f in found]
            scheduler.observe(scheduler.advance(planned, found), 1e-3)
        assert (sum(drafts[3:]) > 0) == pays


def test_static_trees_divide_rows_equally():
    drafter = StaticDrafter(TREE)
    made = [without_heads(key, [1]) for key in range(3)]
    for r in made[:2]:
        r.head_candidates = HeadCandidates(
            np.arange(30, dtype=np.int32).reshape(3, 10), np.zeros((3, 10), dtype=np.float32)
        )
    drafts = drafter.draft(made, lambda: [8, 8, 8], 7).trees
    assert [len(d.parents) for d in drafts] == [4, 3, 0]
    assert len(drafter.draft(made, lambda: [8, 1, 8], 100).trees[0].parents) == TREE.num_draft_tokens
    assert all(d.depth <= 1 for d in drafter.draft(made, lambda: [1, 1, 1], 100).trees)
