"""Several samples of one request, and log-probabilities, between the clients and a scripted engine."""

import asyncio

import pytest
from serving_rig import TOKENIZER, RawClient, as_client, made_up, saying, serving, wait_until

from euryale import client as euryale
from euryale.client import AsyncClient, Client, protocol
from euryale.client.params import RULES

PROMPT = tuple(TOKENIZER.encode("hello world"))


def by_sample(request):
    """Sample i is the quick brown fox from the i-th word on, two tokens a step."""
    return saying(" ".join(["the", "quick", "brown", "fox"][request.sample_index :]), 2)(request)


def test_samples_are_interleaved_and_complete():
    with serving(by_sample) as rig, Client(rig.address) as client:
        generation = client.generate("hello world", n=3, seed=9, max_tokens=50)
        texts, positions = ["", "", ""], [0, 0, 0]
        for delta in generation:
            assert delta.index == positions[delta.sample_index]
            positions[delta.sample_index] += len(delta.tokens)
            texts[delta.sample_index] += delta.text
        result = generation.result()
        assert [add.sample_index for add in rig.engine.adds] == [0, 1, 2]
        assert {(add.prompt, add.params.seed) for add in rig.engine.adds} == {(PROMPT, 9)}
        assert texts == ["the quick brown fox", "quick brown fox", "brown fox"]
        assert [sample.text for sample in result.samples] == texts
        assert [len(sample.tokens) for sample in result.samples] == positions
        assert {(sample.finish_reason, sample.stop) for sample in result.samples} == {("stop", 1)}
        assert (result.text, result.tokens) == (result.samples[0].text, result.samples[0].tokens)
        assert result.usage == euryale.Usage(
            prompt_tokens=len(PROMPT),
            output_tokens=sum(positions),
            decode_steps=sum(len(sample.tokens_per_step) for sample in result.samples),
        )
        stats = client.stats()
        assert (stats["requests_finished"], stats["prompt_tokens"]) == (1, len(PROMPT))
        assert stats["output_tokens"] == sum(positions)


def test_a_single_sample_is_in_samples_too():
    with serving(saying("hello")) as rig, Client(rig.address) as client:
        result = client.generate("hello", max_tokens=20).result()
        assert [sample.text for sample in result.samples] == ["hello"]
        assert (result.samples[0].finish_reason, result.logprobs, result.prompt_logprobs) == ("stop", None, None)


def test_a_stop_string_ends_its_own_sample_only():
    with serving(by_sample) as rig, Client(rig.address) as client:
        result = client.generate("hello world", n=3, stop="quick", logprobs=1, max_tokens=50).result()
        assert [sample.text for sample in result.samples] == ["the ", "", "brown fox"]
        assert [sample.stop for sample in result.samples] == ["quick", "quick", 1]
        assert result.finish_reason == "stop"
        for sample in result.samples:  # tokens after the stop string are dropped, with their logprobs
            assert sample.logprobs == as_client(made_up(list(sample.tokens), 1))
        wait_until(lambda: not rig.engine.running)
        assert set(rig.engine.cancels) <= {1, 2}


def test_the_last_message_is_one():
    with serving(by_sample) as rig, RawClient(rig.address) as raw:
        raw.request(b"id", type="generate", prompt="hello", params={"n": 2, "max_tokens": 50})
        done = raw.receive_final(b"id")
        assert (done.finish_reason, done.stop, done.text) == ("stop", 1, "")
        assert [end.finish_reason for end in done.samples] == ["stop", "stop"]
        assert sum(end.output_tokens for end in done.samples) == done.usage.output_tokens
        raw.request(b"id", type="health")
        assert isinstance(raw.receive()[1], protocol.HealthReply)


def test_cancelling_ends_all_samples():
    with serving(hold=True) as rig, Client(rig.address) as client:
        generation = client.generate("hello world", n=4)
        wait_until(lambda: len(rig.engine.running) == 4)
        assert client.cancel(generation)
        with pytest.raises(euryale.Cancelled) as caught:
            generation.result()
        assert [sample.finish_reason for sample in caught.value.completion.samples] == ["cancelled"] * 4
        wait_until(lambda: not rig.engine.running)
        assert sorted(rig.engine.cancels) == [1, 2, 3, 4]
        wait_until(lambda: client.stats()["requests_in_flight"] == 0)
        assert client.stats()["requests_cancelled"] == 1


def test_a_rejected_sample_fails_its_request():
    with serving(hold=True) as rig, Client(rig.address) as client:
        generation = client.generate("hello world", n=3)
        wait_until(lambda: len(rig.engine.running) == 3)
        rig.engine.running.pop(2)
        rig.engine.outbox.append(rig_rejection(2))
        with pytest.raises(euryale.InvalidRequest, match="too long"):
            generation.result()
        wait_until(lambda: sorted(rig.engine.cancels) == [1, 3])


def rig_rejection(key: int):
    from euryale.frontend import messages

    return messages.Rejected(key=key, code="invalid_request", message="too long")


def test_every_sample_counts_as_a_request():
    with serving(hold=True, max_queue=4) as rig, Client(rig.address) as client:
        with pytest.raises(euryale.InvalidRequest, match="ask for 4 or less"):
            client.generate("hello", n=5).result()
        running = client.generate("hello", n=3)
        wait_until(lambda: len(rig.engine.running) == 3)
        with pytest.raises(euryale.Overloaded, match="no room for 2 more samples"):
            client.generate("hello", n=2).result()
        last = client.generate("hello")
        wait_until(lambda: len(rig.engine.running) == 4)
        with pytest.raises(euryale.Overloaded, match="the maximum"):
            client.generate("hello").result()
        rig.engine.may_step.set()
        assert len(running.result().samples) == 3
        assert last.result().finish_reason == "length"


def test_logprobs_are_sent_once_and_for_every_token():
    with serving() as rig, Client(rig.address) as client:
        generation = client.generate("hello world", n=2, max_tokens=10, logprobs=2, prompt_logprobs=3, seed=1)
        with_prompt = [delta for delta in generation if delta.prompt_logprobs is not None]
        assert [(delta.sample_index, delta.index) for delta in with_prompt] == [(0, 0)]
        result = generation.result()
        assert result.prompt_logprobs == with_prompt[0].prompt_logprobs == as_client(made_up(list(PROMPT[1:]), 3))
        for sample in result.samples:
            assert sample.logprobs == as_client(made_up(list(sample.tokens), 2))
            assert len(sample.logprobs) == len(sample.tokens) == 10
        assert [add.params.prompt_logprobs for add in rig.engine.adds] == [3, None]
        first = result.logprobs[0]
        token = result.tokens[0]
        assert (first.logprob, first.top) == (-token, ((token, -token / 2), (token + 1, -(token + 1) / 2)))


def test_the_client_has_every_parameter():
    assert set(euryale.GenerateParams.__annotations__) == set(RULES)


def test_a_bias_is_a_map_from_ids():
    with serving() as rig, Client(rig.address) as client:
        client.generate("hello", logit_bias={7: -100, 5: 2.5}, min_tokens=3, repetition_penalty=1.1).result()
        params = rig.engine.adds[0].params
        assert params.logit_bias == ((7, -100.0), (5, 2.5))
        assert params.min_tokens == 3
        assert params.repetition_penalty == pytest.approx(1.1, abs=1e-7)  # float32


def test_the_asyncio_client_has_the_same():
    async def ask(address: str):
        async with AsyncClient(address) as client:
            generation = client.generate("hello world", n=2, logprobs=0, max_tokens=50, logit_bias={5: 1})
            samples = {delta.sample_index async for delta in generation}
            return samples, await generation.result()

    with serving(by_sample) as rig:
        samples, result = asyncio.run(ask(rig.address))
    assert samples == {0, 1}
    assert [sample.text for sample in result.samples] == ["the quick brown fox", "quick brown fox"]
    assert all(len(sample.logprobs) == len(sample.tokens) for sample in result.samples)
