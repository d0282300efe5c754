"""The front end over real sockets, with clients that follow the protocol."""

import threading

import pytest
from serving_rig import TOKENIZER, RawClient, ScriptedEngine, saying, serving, wait_until

from euryale.client import Client, protocol
from euryale.scheduler.sampling_params import SamplingParams

LONG = {"max_tokens": 150}


@pytest.fixture(scope="module")
def rig():
    with serving() as rig:
        yield rig


def test_the_order_of_replies(rig):
    with RawClient(rig.address) as raw:
        raw.request(b"id", type="generate", prompt="hello", params={"max_tokens": 6, "seed": 7})
        replies = [raw.receive() for _ in range(3)]
        assert {request_id for request_id, _ in replies} == {b"id"}
        accepted, *deltas = (reply for _, reply in replies)
        prompt = tuple(TOKENIZER.encode("hello"))
        assert accepted == protocol.Queued(prompt_tokens=prompt, seed=7, fingerprint="f00d")
        assert all(isinstance(delta, protocol.Delta) for delta in deltas[:-1])
        final = deltas[-1] if isinstance(deltas[-1], protocol.Done) else raw.receive()[1]
        usage = protocol.Usage(prompt_tokens=len(prompt), output_tokens=6, decode_steps=2)
        assert final == protocol.Done(finish_reason="length", text="", usage=usage)


def test_what_reaches_the_engine():
    with serving() as rig, Client(rig.address) as client:
        client.generate("hello", seed=5).result()
        client.generate(
            prompt_tokens=[7], stop="x", stop_token_ids=[3], temperature=1, top_p=0.5, max_tokens=2
        ).result()
        assert rig.engine.adds[0].params == SamplingParams(seed=5, max_tokens=12)  # the engine's default
        params = rig.engine.adds[1].params
        assert rig.engine.adds[1].prompt == (7,)
        assert (params.stop, params.stop_token_ids, params.temperature, params.max_tokens) == (("x",), (3,), 1, 2)


def test_a_request_without_a_seed_gets_one(rig):
    with RawClient(rig.address) as raw:
        seeds = set()
        for _ in range(3):
            raw.request(b"id", type="generate", prompt="hello")
            seeds.add(raw.receive()[1].seed)
            raw.receive_final(b"id")
        assert len(seeds) == 3


class StepPermits(threading.Event):
    """Lets the engine run one step for each call of ``permit``, while it has a request."""

    def __init__(self, engine: ScriptedEngine) -> None:
        super().__init__()
        self._engine, self._permits = engine, threading.Semaphore(0)

    def permit(self) -> None:
        self._permits.release()

    def is_set(self) -> bool:
        return super().is_set() or (bool(self._engine.running) and self._permits.acquire(blocking=False))


def test_no_half_characters():
    text = "naïve 😀 日本語 ✓"
    with serving(saying(text), hold=True) as rig, Client(rig.address) as client:
        rig.engine.may_step = permits = StepPermits(rig.engine)
        permits.permit()
        pieces = []
        for delta in client.generate("hello", **LONG):  # the next step runs when the last one's text has arrived
            pieces.append(delta.text)
            permits.permit()
        assert all("\ufffd" not in piece for piece in pieces)
        assert "".join(pieces) == text
        assert len(pieces) > 10


def test_an_answer_that_ends_within_a_character():
    tokens = TOKENIZER.encode("a😀")[:-1]
    with serving(lambda request: [[token] for token in tokens]) as rig, Client(rig.address) as client:
        completion = client.generate("hello").result()
        assert completion.text == TOKENIZER.decode(tokens) == "a\ufffd"
        assert completion.tokens == tuple(tokens)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_a_stop_string_gives_the_same_answer_for_any_step_size(size):
    with serving(saying("the quick brown fox jumps", size)) as rig, Client(rig.address) as client:
        completion = client.generate("hello", stop=["ick br", "fox"]).result()
        assert (completion.text, completion.finish_reason, completion.stop) == ("the qu", "stop", "ick br")
        assert completion.tokens == EXPECTED_STOP_TOKENS
        assert sum(completion.tokens_per_step) == len(completion.tokens)
        wait_until(lambda: client.stats()["requests_in_flight"] == 0)


def tokens_until(text, stop):
    tokens = TOKENIZER.encode(text)
    return next(tuple(tokens[:n]) for n in range(1, len(tokens) + 1) if stop in TOKENIZER.decode(tokens[:n]))


EXPECTED_STOP_TOKENS = tokens_until("the quick brown fox jumps", "ick br")


def test_a_stop_string_ends_the_request_in_the_engine():
    with serving() as rig, Client(rig.address) as client:
        rig.engine.pause = 0.02
        assert client.generate("hello", stop="loh", **LONG).text() == "hel"
        wait_until(lambda: rig.engine.cancels == [1])
        wait_until(lambda: client.stats()["requests_in_flight"] == 0)
        stats = client.stats()
        assert (stats["requests_finished"], stats["requests_cancelled"]) == (1, 0)


def test_what_is_held_back_for_a_stop_string_comes_at_the_end():
    with serving(saying("hello wor")) as rig, Client(rig.address) as client:
        assert client.generate("x", stop="world").text() == "hello wor"
