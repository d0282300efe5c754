"""The scheduler with a scripted model: refused requests, row budget, cached pages."""

import dataclasses

import numpy as np
import pytest
from made_up_model import LIMITS, TREE, request, results

from euryale.scheduler.page_pool import PageHasher
from euryale.scheduler.request import FinishReason, Request
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.scheduler import Scheduler
from euryale.scheduler.speculation.drafter import StaticDrafter


def test_an_end_token_inside_an_accepted_path_ends_the_output():
    made = request(0, 3, max_tokens=10)
    assert made.append([5, 2, 6, 7], frozenset([2])) == [5, 2]
    assert made.finish_reason == FinishReason.STOP
    ignoring = request(0, 3, max_tokens=3, ignore_eos=True, stop_token_ids=(6,))
    assert ignoring.append([5, 2], frozenset([2])) == [5, 2]
    assert ignoring.finish_reason is None
    assert ignoring.append([6, 2], frozenset([2])) == [6]
    assert ignoring.finish_reason == FinishReason.STOP
    short = request(0, 3, max_tokens=2)
    assert short.append([5, 5, 5], frozenset()) == [5, 5]
    assert short.finish_reason == FinishReason.LENGTH


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([50], {"max_tokens": 1}, "token id 50 is outside the vocabulary of 50"),
        ([5], {"max_tokens": 1, "logit_bias": ((1 << 30, 1.0),)}, "in the parameters is outside the vocabulary of 50"),
        ([5], {"max_tokens": 9, "stop_token_ids": (50,), "min_tokens": 2}, "in the parameters is outside"),
        ([-1], {"max_tokens": 1}, "token id -1 is outside"),
        ([1] * 60, {"max_tokens": 1}, "ask for at most 0"),
        ([1] * 50, {"max_tokens": 11}, "ask for at most 10"),
    ],
)
def test_a_request_that_can_never_run_is_refused(prompt, params, message):
    scheduler = Scheduler(LIMITS, StaticDrafter(TREE))
    bad = Request(key=0, prompt=np.asarray(prompt, dtype=np.int32), params=SamplingParams(**params))
    with pytest.raises(ValueError, match=message):
        scheduler.add(bad)
    assert not scheduler.has_work


def test_a_request_larger_than_the_cache_is_refused():
    scheduler = Scheduler(dataclasses.replace(LIMITS, num_pages=5), StaticDrafter(TREE))
    with pytest.raises(ValueError, match="need 6 KV pages and there are 5"):
        scheduler.add(request(0, 20, max_tokens=1))


def test_trees_do_not_starve_prompts():
    """With trees that could fill every step, a long prompt still gets half of the rows."""
    scheduler, rng = Scheduler(LIMITS, StaticDrafter(TREE)), np.random.default_rng(0)
    scheduler.add(request(0, 1, max_tokens=30))
    planned = scheduler.plan(1, 0)
    scheduler.advance(planned, results(planned, rng))
    scheduler.add(request(1, 30, max_tokens=2))
    planned = scheduler.plan(1, 0)
    assert [s.num_new_tokens for s in planned.plan.segments] == [1, 6]
    assert planned.plan.num_rows == 12


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 1e-9),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", 1e-50),
        ("top_k", -1),
        ("min_p", 2.0),
        ("seed", -1),
        ("seed", 2**64),
        ("acceptance", "maybe"),
        ("stop", ("",)),
        ("stop", 5),
        ("stop", ("x" * 257,)),
        ("stop_token_ids", (1.5,)),
        ("ignore_eos", 1),
        ("priority", 0.5),
        ("priority", 2**31),
    ],
)
def test_invalid_parameters_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


LARGE = dataclasses.replace(LIMITS, max_model_len=400, max_num_seqs=8, max_num_batched_tokens=64, num_pages=400)


def run_all(scheduler: Scheduler, requests: list[Request]) -> int:
    """Run the requests to their ends; return how many prompt rows were computed."""
    rng, rows = np.random.default_rng(0), 0
    for made in requests:
        scheduler.add(made)
    while scheduler.has_work:
        planned = scheduler.plan(1, 0)
        rows += sum(s.num_new_tokens for s in planned.plan.segments if s.output_index == 0)
        scheduler.advance(planned, results(planned, rng))
    return rows


def with_common_prefix(count: int, num_common: int, num_own: int) -> list[Request]:
    """Return requests whose prompts have a common prefix of ``num_common`` tokens and ``num_own`` further ones each."""
    rng = np.random.default_rng(1)
    head = rng.integers(3, 50, num_common).astype(np.int32)
    tails = rng.integers(3, 50, (count, num_own)).astype(np.int32)
    params = SamplingParams(max_tokens=5)
    return [Request(key=i, prompt=np.concatenate([head, tail]), params=params) for i, tail in enumerate(tails)]


def test_a_common_prefix_is_computed_once():
    scheduler = Scheduler(LARGE, None)
    assert run_all(scheduler, with_common_prefix(32, 200, 7)) == 200 + 32 * 7
    assert scheduler.admission.num_cached_tokens == 31 * 200
    assert scheduler.admission.num_prompt_tokens == 32 * 207
    assert scheduler.admission.pages.num_free == LARGE.num_pages
    # The same prompt again finds all full pages except the last token's.
    assert run_all(scheduler, with_common_prefix(1, 200, 7)) == 207 - 204
    assert run_all(Scheduler(LARGE, None, enable_prefix_caching=False), with_common_prefix(32, 200, 7)) == 32 * 207


def test_the_last_token_is_computed_even_if_its_page_is_cached():
    scheduler = Scheduler(LARGE, None)
    assert [run_all(scheduler, with_common_prefix(1, 8, 0)) for _ in range(2)] == [8, 4]


def test_an_output_is_cached_for_the_next_prompt():
    scheduler, first = Scheduler(LARGE, None), with_common_prefix(1, 20, 0)[0]
    first.params = SamplingParams(max_tokens=13)
    run_all(scheduler, [first])
    longer = np.concatenate([first.prompt, np.asarray(first.output, dtype=np.int32), [3]])
    # 34 tokens, of which the output's last was never computed: eight full pages are cached.
    assert run_all(scheduler, [Request(key=9, prompt=longer.astype(np.int32), params=SamplingParams())]) == 34 - 32


def test_the_least_recently_used_pages_are_evicted_first():
    scheduler = Scheduler(dataclasses.replace(LARGE, num_pages=24), None)
    one, two, three = (with_common_prefix(1, 33 + n, 0)[0] for n in range(3))
    for n, made in enumerate((one, two, three)):
        made.prompt[0] = 40 + n
    for made in (one, two, three):  # ten pages each, nine of them full in the end
        run_all(scheduler, [dataclasses.replace(made, output=[], tokens_per_step=[], page_hashes=[])])
    again = [dataclasses.replace(made, output=[], tokens_per_step=[], page_hashes=[]) for made in (three, one)]
    assert run_all(scheduler, [again[0]]) == 35 - 32
    assert run_all(scheduler, [again[1]]) > 1 + 33 - 32


def test_a_request_whose_prefix_is_being_computed_waits_and_is_overtaken():
    scheduler = Scheduler(dataclasses.replace(LARGE, max_num_batched_tokens=8), None)
    first, second = with_common_prefix(2, 40, 3)
    other = request(7, 5, max_tokens=2)
    for made in (first, second, other):
        scheduler.add(made)
    scheduler.plan(1, 0)
    assert scheduler.admission.running == [first, other]
    scheduler.cancel(first.key)
    scheduler._planned = []
    scheduler.plan(1, 0)
    assert scheduler.admission.running == [other, second]


def test_cancelling_one_that_waits_for_pages_leaves_the_others_waiting():
    scheduler = Scheduler(dataclasses.replace(LARGE, max_num_batched_tokens=8), None)
    first, second, third = with_common_prefix(3, 40, 3)
    for made in (first, second, third):
        scheduler.add(made)
    scheduler.plan(1, 0)
    scheduler.cancel(second.key)
    scheduler._planned = []
    scheduler.plan(1, 0)
    assert scheduler.admission.running == [first]


def test_page_hashes_depend_on_all_tokens_before():
    hasher, one, two = PageHasher(4), [], []
    hasher.extend(one, np.arange(8, dtype=np.int32))
    hasher.extend(two, np.arange(4, dtype=np.int32))
    hasher.extend(two, np.arange(4, 11, dtype=np.int32))  # three tokens more than fill a page
    assert one == two
    assert len({*one}) == 2
    after_others: list[bytes] = []
    hasher.extend(after_others, np.arange(1, 9, dtype=np.int32)[::-1].copy())
    assert not set(after_others) & set(one)
    elsewhere: list[bytes] = []
    PageHasher(4).extend(elsewhere, np.arange(8, dtype=np.int32))
    assert not set(elsewhere) & set(one)
