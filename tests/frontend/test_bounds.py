"""Bounds on what a message may cost before it is accepted: others are served, and memory is limited."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import zmq
from serving_rig import TOKENIZER, RawClient, serving, wait_until
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from euryale import client as euryale
from euryale.client import Client, protocol
from euryale.frontend import client_socket, intake
from euryale.frontend.client_socket import ClientPort
from euryale.frontend.config import FrontEndConfig
from euryale.frontend.connections import most_connections
from euryale.frontend.validation import PIECE_CHARACTERS, RequestError, RequestLimits, read_prompt

LONG = "hello world"  # while the gate is in use
SHORT = "hello"


@dataclass
class Gate:
    """Long texts are tokenized only while it is open."""

    is_open: threading.Event = field(default_factory=threading.Event)
    texts: list[str] = field(default_factory=list)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, encode = Gate(), TOKENIZER.encode

    def wait_and_encode(text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > len(SHORT):
            gate.texts.append(text)
            assert gate.is_open.wait(20)
        return encode(text, add_special_tokens)

    monkeypatch.setattr(TOKENIZER, "encode", wait_and_encode)
    monkeypatch.setattr(intake, "MAX_INLINE_CHARACTERS", len(SHORT))
    yield gate
    gate.is_open.set()


def test_others_are_served_while_a_prompt_is_tokenized(gate):
    with serving() as rig, RawClient(rig.address) as raw, Client(rig.address, timeout=10) as client:
        raw.request(b"long", type="generate", prompt=LONG)
        wait_until(lambda: gate.texts)
        assert client.generate(SHORT, max_tokens=30).result().usage.output_tokens == 30
        raw.request(b"health", type="health")
        assert raw.receive()[0] == b"health"
        assert client.stats()["requests_in_flight"] == 1
        gate.is_open.set()
        assert raw.receive()[1].prompt_tokens == tuple(TOKENIZER.encode(LONG))
        assert raw.receive_final(b"long").finish_reason == "length"


def test_requests_of_a_connection_keep_their_order_and_connections_take_turns(gate):
    with serving(hold=True) as rig, RawClient(rig.address) as one, RawClient(rig.address) as two:
        for number in range(3):
            one.request(b"%d" % number, type="generate", prompt=f"{LONG} 1{number}")
        one.request(b"short", type="generate", prompt=SHORT)
        wait_until(lambda: len(gate.texts) == 1)
        two.request(b"0", type="generate", prompt=f"{LONG} 20")
        wait_until(lambda: len(gate.texts) == 2)
        gate.is_open.set()
        wait_until(lambda: len(rig.engine.adds) == 5)
        prompts = [TOKENIZER.decode(list(asked.prompt)) for asked in rig.engine.adds]
        assert [p for p in prompts if p != f"{LONG} 20"] == [f"{LONG} 10", f"{LONG} 11", f"{LONG} 12", SHORT]
        assert prompts.index(f"{LONG} 20") < prompts.index(f"{LONG} 12")


@pytest.mark.parametrize("n", [1, 2])
def test_a_cancel_while_the_prompt_is_tokenized(gate, n):
    with serving() as rig, RawClient(rig.address) as raw, Client(rig.address, timeout=10) as client:
        for request_id in (b"running", b"waiting"):
            raw.request(request_id, type="generate", prompt=LONG, params={"n": n})
        wait_until(lambda: gate.texts)
        for target in (b"running", b"waiting"):
            raw.request(b"cancel", type="cancel", target=target)
            request_id, done = raw.receive()
            assert (request_id, done.finish_reason, done.usage.prompt_tokens) == (target, "cancelled", 0)
            assert (done.samples is None) == (n == 1)
            assert raw.receive() == (b"cancel", protocol.CancelReply(found=True))
        assert client.stats()["requests_in_flight"] == n  # a thread is at work on one
        raw.request(b"running", type="generate", prompt=LONG)  # the id is free again
        gate.is_open.set()
        assert raw.receive_final(b"running").finish_reason == "length"
        stats = wait_until(lambda: (s := client.stats())["requests_in_flight"] == 0 and s)
        assert (stats["requests_cancelled"], stats["requests_finished"], len(rig.engine.adds)) == (2, 1, 1)


def test_the_client_reads_a_cancel_before_its_request_was_queued(gate):
    with serving() as rig, Client(rig.address, timeout=10) as client:
        generation = client.generate(LONG)
        wait_until(lambda: gate.texts)
        assert client.cancel(generation)
        with pytest.raises(euryale.Cancelled) as caught:
            generation.result()
        assert (caught.value.completion.tokens, caught.value.completion.prompt_tokens) == ((), ())


def test_a_client_that_vanishes_while_its_prompt_is_tokenized(gate):
    with serving() as rig, Client(rig.address, timeout=10) as watcher:
        with RawClient(rig.address) as raw:
            raw.request(b"1", type="generate", prompt=LONG)
            raw.request(b"2", type="generate", prompt=LONG)
            wait_until(lambda: gate.texts and watcher.stats()["requests_in_flight"] == 2)
        wait_until(lambda: watcher.stats()["requests_cancelled"] == 2)
        gate.is_open.set()
        wait_until(lambda: watcher.stats()["requests_in_flight"] == 0)
        assert not rig.engine.adds


def test_what_is_tokenized_counts_as_in_flight(gate, monkeypatch):
    with serving(hold=True, max_queue=3) as rig, RawClient(rig.address) as raw, Client(rig.address) as client:
        raw.request(b"id", type="generate", prompt=LONG, params={"n": 2})
        wait_until(lambda: gate.texts)
        raw.request(b"id", type="health")
        assert raw.receive()[1].code == "duplicate_request_id"
        raw.request(b"two", type="generate", prompt=LONG, params={"n": 2})
        assert raw.receive()[1].code == "overloaded"
        monkeypatch.setattr(intake, "MAX_PENDING_BYTES", 100)
        with pytest.raises(euryale.Overloaded, match="MiB of prompts to tokenize"):
            client.generate("x" * 200).result()


def test_a_drain_waits_for_prompts_that_are_tokenized(gate):
    with serving() as rig, RawClient(rig.address) as raw:
        raw.request(b"id", type="generate", prompt=LONG)
        wait_until(lambda: gate.texts)
        rig.frontend.begin_drain()
        raw.request(b"late", type="generate", prompt=SHORT)
        assert raw.receive()[1].code == "draining"
        gate.is_open.set()
        assert raw.receive_final(b"id").finish_reason == "length"
        wait_until(lambda: rig.outcome == ["drained"])


def test_a_drain_does_not_wait_for_ever_for_a_prompt(gate):
    with serving(drain_timeout=0.2) as rig, RawClient(rig.address) as raw:
        raw.request(b"id", type="generate", prompt=LONG)
        wait_until(lambda: gate.texts)
        rig.frontend.begin_drain()
        assert raw.receive_final(b"id").finish_reason == "cancelled"
        wait_until(lambda: rig.outcome == ["drained"])


def test_an_engine_lost_while_a_prompt_is_tokenized(gate):
    with serving() as rig, RawClient(rig.address) as raw:
        raw.request(b"id", type="generate", prompt=LONG)
        wait_until(lambda: gate.texts)
        rig.engine.dies = True
        assert raw.receive_final(b"id").code == "group_lost"
        wait_until(lambda: rig.outcome == ["group_lost"])


def test_a_long_text_is_refused_before_all_of_it_is_tokenized(gate):
    gate.is_open.set()
    with serving() as rig, RawClient(rig.address) as raw:
        for fields in ({"prompt": "hello " * 500_000}, {"messages": [{"role": "user", "content": "x" * 3_000_000}]}):
            gate.texts.clear()
            raw.request(b"id", type="generate", **fields)
            error = raw.receive()[1]
            assert (error.code, "leaves no room for an answer" in error.message) == ("invalid_request", True)
            assert sum(map(len, gate.texts)) == PIECE_CHARACTERS


def test_a_long_text_of_few_tokens_is_taken():
    """64 letters are a token: the text is counted in pieces first, and its tokens are those of the whole."""
    words = ["a" * 2**n for n in range(7)]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [(w, w) for w in words[:-1]]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    limits = RequestLimits(max_tokens=2000, vocab_size=7, defaults={})
    for extra in (0, 1):
        prompt = read_prompt(protocol.Generate(prompt="a" * (64 * 1999 + extra - 64)), tokenizer, limits)
        np.testing.assert_array_equal(prompt, [6] * 1998 + [0] * extra)
    with pytest.raises(RequestError, match="the prompt has 2001 tokens"):
        read_prompt(protocol.Generate(prompt="a" * (64 * 2001)), tokenizer, limits)


def test_a_busy_front_end_does_not_take_its_engine_for_dead(monkeypatch):
    encode = TOKENIZER.encode
    with serving(engine_timeout=1.0) as rig, Client(rig.address, timeout=10) as client:
        monkeypatch.setattr(TOKENIZER, "encode", lambda *args, **more: time.sleep(1.5) or encode(*args, **more))
        assert client.generate("hello").text()
        assert not rig.outcome


def test_a_message_of_many_frames_is_read_in_slices():
    context = zmq.Context()
    port = ClientPort(context, FrontEndConfig(bind="tcp://127.0.0.1:0"))
    with contextlib.closing(port), RawClient(port.endpoint) as raw:
        raw.send(b"id", *[b"x"] * (3 * client_socket.MAX_TURN_FRAMES))
        assert port.socket.poll(10_000)
        calls = [list(port.receive(16)) for _ in range(4)]
        assert [len(call) for call in calls] == [0, 0, 0, 1]
        assert calls[3][0][1:] == [b"id", b"x", b""]
        raw.send(b"id", b"body")
        assert port.socket.poll(10_000)
        (message,) = port.receive(16)
        assert message[1:] == [b"id", b"body"]
    context.term()


def zmtp(address: str) -> socket.socket:
    """A connection on which a DEALER has shaken hands (ZMTP 3.1, NULL)."""
    host, port = address.removeprefix("tcp://").split(":")
    raw = socket.create_connection((host, int(port)), timeout=10)
    raw.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32))
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    raw.sendall(bytes([4, len(ready)]) + ready)
    return raw


def test_a_message_without_an_end_costs_its_connection():
    with serving(max_message_bytes=50_000) as rig, Client(rig.address, timeout=10) as client:
        with zmtp(rig.address) as raw:
            wait_until(lambda: client.stats()["clients"] == 2)
            raw.setblocking(False)
            frames = bytes([1, 0]) * 10_000  # empty ones, with more to come

            def send() -> bool:
                with contextlib.suppress(OSError):
                    raw.send(frames)
                return client.stats()["clients"] == 1

            wait_until(send)
        for _ in range(20):  # whole messages do not add up
            assert client.generate("hello " * 30, stop=["x" * 200] * 16, max_tokens=3).text()


def test_as_many_connections_as_there_is_room_for(monkeypatch):
    monkeypatch.setattr(client_socket, "most_connections", lambda: 6)
    with serving() as rig, Client(rig.address, timeout=10) as client:
        assert client.health().status == "ok"
        host, port = rig.address.removeprefix("tcp://").split(":")
        others = []
        for _ in range(20):
            other = socket.socket()
            other.setblocking(False)
            other.connect_ex((host, int(port)))
            others.append(other)
        connections = rig.frontend._port._connections
        wait_until(lambda: rig.frontend._port._is_full and len(connections) <= 6)
        assert client.generate("hello").text()  # earlier clients are served
        for other in others:
            other.close()
        with Client(rig.address, timeout=10) as late:
            assert late.generate("hello").text()
        wait_until(lambda: client.stats()["clients"] == 1)


def test_room_for_connections_is_what_the_limit_of_files_leaves():
    before = most_connections()
    with socket.socket(), socket.socket():
        assert most_connections() == before - 2
