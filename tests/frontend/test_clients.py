"""Clients that leave or do not read, and more requests than the server accepts."""

import time

import pytest
from serving_rig import RawClient, echo, serving, wait_until

from euryale import client as euryale
from euryale.client import Client, protocol, wire
from euryale.frontend import client_socket as frontend_port
from euryale.frontend import messages
from euryale.scheduler.step_result import RequestOutput

LONG = {"max_tokens": 150}


def test_a_client_that_vanishes_is_cancelled_at_once():
    with serving(hold=True) as rig, Client(rig.address) as watcher:
        with RawClient(rig.address) as raw:
            for number in range(3):
                raw.request(b"%d" % number, type="generate", prompt="hello", params=LONG)
            wait_until(lambda: len(rig.engine.adds) == 3)
            wait_until(lambda: watcher.stats()["clients"] == 2)
        start = time.monotonic()
        wait_until(lambda: sorted(rig.engine.cancels) == [1, 2, 3])
        # No step runs, so no message to the client can fail: the closed connection itself is noticed.
        assert time.monotonic() - start < 0.8
        stats = wait_until(lambda: (s := watcher.stats())["requests_in_flight"] == 0 and s)
        assert (stats["requests_cancelled"], stats["clients"]) == (3, 1)


def test_a_client_that_vanishes_mid_stream():
    with serving() as rig, Client(rig.address) as watcher:
        rig.engine.pause = 0.02
        with RawClient(rig.address) as raw:
            raw.request(b"id", type="generate", prompt="hello", params=LONG)
            wait_until(lambda: isinstance(raw.receive()[1], protocol.Delta))
        wait_until(lambda: rig.engine.cancels == [1])
        assert watcher.generate("world", max_tokens=5).result().usage.output_tokens == 5


def test_a_client_that_does_not_read_is_given_up(monkeypatch, tmp_path):
    # Less room everywhere, so that the test need not fill the usual megabytes; a unix socket buffers 200 kB.
    monkeypatch.setattr(frontend_port, "SEND_HIGH_WATER", 10)
    with (
        serving(bind=f"ipc://{tmp_path}/socket", max_backlog_bytes=20_000, max_queue=1000) as rig,
        RawClient(rig.address, RCVHWM=1) as raw,
        Client(rig.address) as client,
    ):
        rig.engine.pause = 0.01
        for number in range(600):
            raw.request(b"%d" % number, type="generate", prompt_tokens=wire.pack_tokens([5] * 190))
        wait_until(lambda: len(rig.engine.cancels) > 0, 30)
        assert client.generate("hello").text()
        # When it reads again, it gets the error.
        wait_until(lambda: (reply := raw.receive())[0] == b"" and reply[1].code == "slow_reader", 20)
        assert client.stats()["requests_failed"] == 0


def test_signs_of_life():
    with serving(hold=True) as rig, RawClient(rig.address) as raw:
        raw.request(b"id", type="generate", prompt="hello")
        assert isinstance(raw.receive()[1], protocol.Queued)
        start = time.monotonic()
        kinds = set()
        while time.monotonic() - start < 1.5 and raw.socket.poll(1500):
            request_id, body = raw.socket.recv_multipart()
            kinds.add((request_id, type(wire.decode(body, protocol.REPLIES, strict=True))))
        assert kinds == {(b"", protocol.Alive)}


def test_overload():
    with serving(hold=True, max_queue=2) as rig, Client(rig.address, timeout=10) as client:
        running = [client.generate("hello") for _ in range(2)]
        refused = client.generate("hello")
        with pytest.raises(euryale.Overloaded, match="2 requests in flight") as caught:
            refused.result()
        assert 0 < caught.value.retry_after <= 30
        rig.engine.may_step.set()
        for generation in running:
            generation.result()
        client.generate("hello").result()
        stats = client.stats()
        assert (stats["requests_received"], stats["requests_finished"], stats["requests_rejected"]) == (4, 3, 1)


def test_a_slot_is_held_until_the_engine_lets_go():
    with serving(hold=True, max_queue=1) as rig, Client(rig.address, timeout=10) as client:
        rig.engine.script = lambda request: [[5]] if request.key > 1 else echo(request)
        generation = client.generate("hello")
        wait_until(lambda: rig.engine.adds)
        wait_until(lambda: client.cancel(generation) or True)
        with pytest.raises(euryale.Cancelled):
            generation.result()
        wait_until(lambda: client.stats()["requests_in_flight"] == 0)
        rig.engine.may_step.set()
        assert client.generate("hello").result().tokens == (5,)


def test_late_output_of_a_cancelled_request_is_ignored():
    with serving(hold=True) as rig, Client(rig.address, timeout=10) as client:
        generation = client.generate("hello")
        wait_until(lambda: rig.engine.running)
        rig.engine.running.clear()  # as if it had ended in the engine while the cancel was under way
        assert client.cancel(generation)
        late = [RequestOutput(1, [5, 6], None), RequestOutput(1, [7], "length"), RequestOutput(99, [7], "stop")]
        rig.engine.outbox.append(messages.StepOutput(outputs=late))
        with pytest.raises(euryale.Cancelled) as caught:
            generation.result()
        assert caught.value.completion.tokens == ()
        wait_until(lambda: client.stats()["requests_in_flight"] == 0)


def test_a_request_the_engine_rejects():
    with serving(hold=True) as rig, Client(rig.address, timeout=10) as client:
        generation = client.generate("hello")
        wait_until(lambda: rig.engine.adds)
        rig.engine.running.clear()
        rig.engine.outbox.append(messages.Rejected(key=1, code="invalid_request", message="needs 9 pages, has 8"))
        with pytest.raises(euryale.InvalidRequest, match="needs 9 pages"):
            generation.result()
        assert client.stats()["requests_failed"] == 1
