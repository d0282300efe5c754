"""Logits inputs in plans: of requests with penalties or logprobs, and that others have none."""

import dataclasses

import numpy as np
from made_up_model import LIMITS, TREE, results
from test_scheduler import LARGE

from euryale.scheduler.logits_inputs import History
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.scheduler import Scheduler
from euryale.scheduler.speculation.drafter import StaticDrafter
from euryale.scheduler.step_result import SegmentResult, TokenLogprobs


def request(length: int, key: int = 0, output: list[int] | None = None, **params) -> Request:
    prompt = (np.arange(length) * 7 % 40 + 3).astype(np.int32)
    return Request(key=key, prompt=prompt, params=SamplingParams(**params), output=output or [])


def as_logprobs(tokens) -> TokenLogprobs:
    """Return log-probabilities whose values are the tokens themselves."""
    nothing = np.zeros((len(tokens), 0))
    return TokenLogprobs(np.asarray(tokens, dtype=np.float32), nothing.astype(np.int32), nothing.astype(np.float32))


def with_logprobs(planned, found: list[SegmentResult]) -> list[SegmentResult]:
    """Return the scripted results of a plan, with log-probabilities where they were requested."""
    out, found = [], iter(found)
    for segment in planned.plan.segments:
        if segment.has_result:
            empty = SegmentResult(tokens=[], accepted_nodes=[])
            result = next(found) if segment.emits_tokens else empty
            targets = segment.logits_inputs.targets if segment.logits_inputs else ()
            prompt = as_logprobs(targets) if len(targets) else None
            tokens = as_logprobs(result.tokens)
            out.append(dataclasses.replace(result, logprobs=tokens, prompt_logprobs=prompt))
    return out


def test_a_request_without_such_parameters_has_no_logits_inputs():
    for params in ({}, {"temperature": 0.7, "top_p": 0.9, "stop_token_ids": (4,), "n": 3}):
        assert request(5, **params).logits_inputs(5, True, frozenset([2])) is None
    penalised = request(9, frequency_penalty=0.5)
    assert penalised.logits_inputs(4, False, frozenset()) is None, "no token is drawn from a prompt's rows"
    assert penalised.logits_inputs(9, True, frozenset()).frequency == 0.5
    barred = request(5, min_tokens=3, output=[7, 7], stop_token_ids=(9,))
    assert barred.logits_inputs(1, True, frozenset([2])).ends.tolist() == [2, 9]
    barred.output.append(8)
    assert barred.logits_inputs(1, True, frozenset([2])) is None, "nothing is barred any more"


def test_a_history_counts_the_output():
    history, output = History(np.asarray([5, 6, 5], dtype=np.int32)), []
    rng = np.random.default_rng(0)
    for _ in range(30):
        output += rng.integers(0, 9, rng.integers(0, 4)).tolist()
        ids, counts = history.table(output)
        assert sorted(ids) == sorted({5, 6, *output})
        assert [output.count(token) for token in ids] == counts.tolist()
    assert request(4, frequency_penalty=1, output=[3]).logits_inputs(1, True, frozenset()).history.tolist() == [
        [3],
        [1],
    ]
    seen = request(2, repetition_penalty=2, output=[3]).logits_inputs(1, True, frozenset()).history
    assert dict(seen.T.tolist()) == {3: 1, 10: 0}


def test_every_prompt_token_is_scored_once():
    """In chunks, and also if the prompt is computed twice."""
    scheduler, rng = Scheduler(LIMITS, StaticDrafter(TREE)), np.random.default_rng(0)
    asking = request(40, prompt_logprobs=2, logprobs=0, max_tokens=9)
    scheduler.add(asking)
    scheduler.add(request(11, key=1, max_tokens=5))
    outputs = []
    for step in range(100):
        if step == 2:
            assert 0 < len(asking.prompt_logprobs) < 39
            asking.num_computed = 0
        if not scheduler.has_work:
            break
        planned = scheduler.plan(1, 0)
        outputs += [
            o
            for o in scheduler.advance(planned, with_logprobs(planned, results(planned, rng))).outputs
            if o.key == asking.key
        ]
    assert [p for part in asking.prompt_logprobs for p in part.chosen.tolist()] == asking.prompt[1:].tolist()
    assert [output.prompt_logprobs is not None for output in outputs] == [True] + [False] * (len(outputs) - 1)
    assert [p for o in outputs for p in o.logprobs.chosen.tolist()] == asking.output
    assert len(outputs[-1].logprobs) == len(outputs[-1].tokens)


def test_prompt_logprobs_compute_the_whole_prompt_and_cache_its_pages():
    scheduler, rng = Scheduler(LARGE, None), np.random.default_rng(0)

    def run(key: int, **params) -> int:
        before = scheduler.admission.num_cached_tokens
        scheduler.add(request(200, key=key, max_tokens=1, **params))
        while scheduler.has_work:
            planned = scheduler.plan(1, 0)
            scheduler.advance(planned, with_logprobs(planned, results(planned, rng)))
        return scheduler.admission.num_cached_tokens - before

    assert run(0, prompt_logprobs=0) == 0
    assert run(1) == 199 // LARGE.page_size * LARGE.page_size
    assert run(2, prompt_logprobs=5) == 0
    assert run(3, logprobs=5, presence_penalty=1.0) > 0
    assert scheduler.admission.pages.num_free == LARGE.num_pages
