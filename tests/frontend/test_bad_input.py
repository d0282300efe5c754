"""Bad input over real sockets: each sender gets its own error, and no other client is affected."""

import random
import socket

import msgpack
import pytest
from serving_rig import TOKENIZER, RawClient, serving, wait_until

from euryale import client as euryale
from euryale.client import Client, protocol, wire

LONG = {"max_tokens": 150}


@pytest.fixture(scope="module")
def rig():
    with serving() as rig:
        yield rig


GENERATE = {"type": "generate", "v": 2}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "exactly one of prompt, prompt_tokens and messages, not 0"),
        ({"prompt": "a", "prompt_tokens": b"\1\0\0\0"}, "not 2 of them"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt_tokens": b""}, "the prompt is empty"),
        ({"prompt_tokens": wire.pack_tokens([5, 100_000])}, "token id 100000; this model's ids are 0 to"),
        ({"prompt_tokens": wire.pack_tokens([-1])}, "token id -1"),
        ({"prompt_tokens": wire.pack_tokens([5] * 200)}, "shorten the prompt to 199 or fewer"),
        ({"prompt": "ab " * 100_000}, "and leaves no room for an answer"),
        ({"prompt_tokens": wire.pack_tokens([5] * 190), "params": {"max_tokens": 11}}, "use max_tokens 10 or less"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last role must be user"),
        ({"prompt": "a", "continue_from": b""}, "unknown field 'continue_from'"),
        ({"prompt": "a", "params": {"temperatur": 1}}, "unknown sampling parameter 'temperatur': use one of"),
        ({"prompt": "a", "params": {"max_tokens": 0}}, "max_tokens must be a whole number of tokens from 1 to"),
        ({"prompt": "a", "params": {"max_tokens": -5}}, "max_tokens must be a whole number of tokens from 1 to"),
        ({"prompt": "a", "params": {"max_tokens": "5"}}, "max_tokens must be a whole number of tokens from 1"),
        ({"prompt": "a", "params": {"max_tokens": 2.5}}, "max_tokens must be a whole number of tokens from 1"),
        (
            {"prompt": "a", "params": {"temperature": "hot"}},
            "temperature must be 0 (greedy) or a number from 0.001 to 100, not 'hot'",
        ),
        ({"prompt": "a", "params": {"temperature": float("nan")}}, "temperature must be"),
        ({"prompt": "a", "params": {"temperature": [[1]]}}, "temperature must be"),
        ({"prompt": "a", "params": {"seed": -1}}, "seed must be a whole number from 0 to"),
        ({"prompt": "a", "params": {"stop": [5]}}, "stop must be"),
        (
            {"prompt": "a", "params": {"stop": [""]}},
            "stop must be a string of Unicode text of 1 to 256 characters, or a list",
        ),
        ({"prompt": "a", "params": {"stop_token_ids": [100_000]}}, "stop_token_ids contains token id 100000"),
        (
            {"prompt": "a", "params": {"stop_token_ids": [5] * 1000}},
            "stop_token_ids must be a list of at most 256 items",
        ),
        ({"prompt": "a", "params": {"speculation": 1}}, "speculation must be"),
        ({"prompt": "a", "params": {"priority": 2**31}}, "priority must be a whole number from"),
        (
            {"prompt": "a", "params": {"presence_penalty": 2.5}},
            "presence_penalty must be a number from -2 to 2, not 2.5",
        ),
        (
            {"prompt": "a", "params": {"frequency_penalty": "1"}},
            "frequency_penalty must be a number from -2 to 2, not '1'",
        ),
        (
            {"prompt": "a", "params": {"repetition_penalty": 0}},
            "repetition_penalty must be a number from 0.01 to 100, not 0",
        ),
        ({"prompt": "a", "params": {"logit_bias": {"5": 101}}}, "to numbers from -100 to 100"),
        ({"prompt": "a", "params": {"logit_bias": {"5": float("inf")}}}, "a map from at most 300 token ids to numbers"),
        ({"prompt": "a", "params": {"logit_bias": {"5": {"6": 1}}}}, "a map from at most 300 token ids to numbers"),
        ({"prompt": "a", "params": {"logit_bias": {"five": 1}}}, "written as strings such as '42'"),
        ({"prompt": "a", "params": {"logit_bias": {"-5": 1}}}, "written as strings such as '42'"),
        ({"prompt": "a", "params": {"logit_bias": {"9" * 5000: 1}}}, "written as strings such as '42'"),
        ({"prompt": "a", "params": {"logit_bias": {"5": 1, "05": 2}}}, "names a token twice"),
        ({"prompt": "a", "params": {"logit_bias": {"100000": 1}}}, "logit_bias contains token id 100000"),
        (
            {"prompt": "a", "params": {"logit_bias": {str(i): 1 for i in range(301)}}},
            "a map from at most 300 token ids",
        ),
        ({"prompt": "a", "params": {"logit_bias": [[5, 1]]}}, "a map from at most 300 token ids"),
        ({"prompt": "a", "params": {"min_tokens": 30, "max_tokens": 20}}, "lower it or raise max_tokens"),
        ({"prompt": "a", "params": {"min_tokens": -1}}, "min_tokens must be a whole number of tokens from 0"),
        ({"prompt": "a", "params": {"logprobs": 21}}, "logprobs must be a whole number from 0 to 20"),
        ({"prompt": "a", "params": {"logprobs": True}}, "logprobs must be a whole number"),
        ({"prompt": "a", "params": {"prompt_logprobs": -1}}, "prompt_logprobs must be a whole number from 0 to 20"),
        ({"prompt": "a", "params": {"n": 0}}, "n must be a whole number of samples from 1 to 128"),
        ({"prompt": "a", "params": {"n": 1.0}}, "n must be a whole number of samples"),
        ({"prompt": "a", "params": {"n": 2**63}}, "n must be a whole number of samples from 1 to 128"),
        ({"prompt": "a", "params": {"acceptance": "x" * 100_000}}, "acceptance must be exact or typical, not 'xxx"),
    ],
)
def test_requests_that_cannot_work(rig, fields, text):
    with RawClient(rig.address) as raw:
        raw.request(b"id", **(GENERATE | fields))
        request_id, error = raw.receive()
        assert request_id == b"id"
        assert isinstance(error, protocol.Error)
        assert error.code == "invalid_request"
        assert text in error.message
        assert len(error.message) < 1000
        raw.request(b"id", type="health")
        assert raw.receive_final(b"id").status == "ok"


def test_a_model_without_a_chat_template(rig, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", None)
    with Client(rig.address) as client:
        assert client.hello().chat is False
        with pytest.raises(euryale.InvalidRequest, match="no chat template: send the whole text as prompt"):
            client.generate(messages=[{"role": "user", "content": "x"}]).result()


def test_a_tokenizer_that_fails(rig, monkeypatch):
    def fail(text, add_special_tokens):
        raise RuntimeError("secret")

    monkeypatch.setattr(TOKENIZER, "encode", fail)
    with Client(rig.address) as client:
        with pytest.raises(euryale.EuryaleError, match="the server failed on this request") as caught:
            client.generate("hello").result()
        assert caught.value.code == "internal"
        assert client.health().status == "ok"


HELLO = msgpack.packb({"type": "hello", "v": 2})


@pytest.mark.parametrize(
    ("frames", "request_id", "code"),
    [
        ([b""], b"", "malformed"),
        ([b"id"], b"id", "malformed"),
        ([b"id", HELLO, b"more"], b"id", "malformed"),
        ([b"", HELLO], b"", "malformed"),
        ([b"x" * 65, HELLO], b"", "malformed"),
        ([b"id", b""], b"id", "malformed"),
        ([b"id", b"\xc1"], b"id", "malformed"),
        ([b"id", b"GET / HTTP/1.1"], b"id", "malformed"),
        ([b"id", msgpack.packb("hello")], b"id", "malformed"),
        ([b"id", b"\x91" * 50_000 + b"\xc0"], b"id", "malformed"),
        ([b"id", msgpack.packb({"type": "hello", "v": 9})], b"id", "unsupported_version"),
        ([b"id", msgpack.packb({"type": "shutdown", "v": 2})], b"id", "unknown_verb"),
        ([b"id", msgpack.packb({"type": "hello", "v": 2, "x": 1})], b"id", "invalid_request"),
        ([b"x" * 64, b"x" * 5_000_000], b"x" * 64, "too_large"),
    ],
)
def test_malformed_messages(rig, frames, request_id, code):
    with RawClient(rig.address) as raw:
        raw.send(*frames)
        got, error = raw.receive()
        assert (got, error.code) == (request_id, code)
        raw.send(b"next", HELLO)
        assert raw.receive()[0] == b"next"


def test_a_huge_message_loses_its_connection_only(rig):
    with RawClient(rig.address) as raw, Client(rig.address) as client:
        raw.send(b"id", b"x" * (20 << 20))
        raw.send(b"next", HELLO)  # after reconnecting
        assert raw.receive()[0] == b"next"
        assert client.health().status == "ok"


def test_a_request_id_in_flight_cannot_be_used_again():
    with serving(hold=True) as rig, RawClient(rig.address) as raw:
        raw.request(b"id", type="generate", prompt="hello")
        assert raw.receive()[0] == b"id"
        for fields in ({"type": "generate", "prompt": "hello"}, {"type": "health"}, {"type": "nonsense"}):
            raw.request(b"id", **fields)
            request_id, error = raw.receive()
            assert (request_id, error.code, error.request_id) == (b"", "duplicate_request_id", b"id")
        rig.engine.may_step.set()
        assert raw.receive_final(b"id").finish_reason == "length"
        assert len(rig.engine.adds) == 1
        raw.request(b"id", type="health")  # free again
        assert raw.receive_final(b"id").status == "ok"


def test_the_same_request_id_from_two_clients(rig):
    with RawClient(rig.address) as one, RawClient(rig.address) as two:
        for raw, size in ((one, 5), (two, 9)):
            raw.request(b"id", type="generate", prompt="hello", params={"max_tokens": size})
        assert one.receive_final(b"id").usage.output_tokens == 5
        assert two.receive_final(b"id").usage.output_tokens == 9


def test_fuzz(rig):
    """Random bytes and damaged messages get one reply each if they have an id, and the server continues."""
    rng = random.Random(5)
    valid = [
        HELLO,
        msgpack.packb({"type": "generate", "v": 2, "prompt": "hello", "params": {"max_tokens": 3, "stop": ["x"]}}),
        msgpack.packb({"type": "generate", "v": 2, "prompt_tokens": wire.pack_tokens([3, 4]), "params": {}}),
        msgpack.packb({"type": "generate", "v": 2, "messages": [{"role": "user", "content": "x"}]}),
        msgpack.packb({"type": "cancel", "v": 2, "target": b"x"}),
        msgpack.packb({"type": "stats", "v": 2}),
    ]
    with RawClient(rig.address) as raw, Client(rig.address) as client:
        expected = set()
        for number in range(600):
            body = bytearray(rng.choice(valid)) if number % 4 else bytearray(rng.randbytes(rng.randrange(60)))
            for _ in range(rng.randrange(4)):
                if body:
                    body[rng.randrange(len(body))] = rng.randrange(256)
            if rng.random() < 0.1:
                del body[rng.randrange(len(body) + 1) :]
            if b"drain" in body:
                continue
            request_id = b"%d" % number
            frames = [request_id, bytes(body)]
            if rng.random() < 0.1:
                frames = [rng.randbytes(rng.randrange(70)) for _ in range(rng.randrange(1, 5))]
            else:
                expected.add(request_id)
            raw.send(*frames)
        while expected:
            request_id, reply = raw.receive()
            if not isinstance(reply, protocol.STREAMED):
                expected.discard(request_id)
        assert client.generate("hello").text()
        wait_until(lambda: client.stats()["requests_in_flight"] == 0)


def test_other_protocols_at_the_door(rig):
    host, port = rig.address.removeprefix("tcp://").split(":")
    for payload in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 1000, b""):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(payload)
    with Client(rig.address) as client:
        assert client.health().status == "ok"
