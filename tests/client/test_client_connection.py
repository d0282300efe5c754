"""The synchronous client with servers that are unreachable, slow, invalid or killed."""

import gc
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import MappingProxyType

import pytest
import zmq
from serving_rig import serving, wait_until

from euryale import client as euryale
from euryale.client import Client, protocol, wire

LONG = {"max_tokens": 150}


@pytest.fixture
def rig():
    with serving() as rig:
        yield rig


def test_too_large_is_seen_before_sending():
    with serving(max_message_bytes=10_000) as rig, Client(rig.address, max_message_bytes=5_000) as client:
        with pytest.raises(euryale.TooLarge, match="the server accepts 5000: shorten it"):
            client.generate("x" * 5_000)
        assert client.hello().max_message_bytes == 10_000
        assert client._session.max_message_bytes == 10_000


def test_a_message_beyond_all_limits_ends_the_connection_only():
    with (
        serving(max_message_bytes=10_000) as rig,
        Client(rig.address, timeout=10) as good,
        Client(rig.address, timeout=10) as bad,
    ):
        rig.engine.pause = 0.01
        running = good.generate("hello", **LONG)
        with pytest.raises(euryale.TooLarge):  # slightly too large: the server answers
            bad.generate("x" * 15_000).result()
        with pytest.raises(euryale.ServerLost):  # far too large: the server disconnects
            bad.generate("x" * 50_000).result()
        assert bad.health().status == "ok"  # with a new connection
        assert len(running.result().tokens) == 150


def test_no_server():
    with Client("tcp://127.0.0.1:1", connect_timeout=0.2) as client:
        with pytest.raises(euryale.ServerLost, match=r"no server answered at tcp://127.0.0.1:1 within 0.2 seconds"):
            client.hello()
        with pytest.raises(ConnectionError):
            client.generate("hello")


def test_an_invalid_address_is_refused():
    with pytest.raises(ValueError, match="address must be tcp://host:port or ipc://path, not 'localhost:5555'"):
        Client("localhost:5555")


def test_timeout():
    with serving(hold=True) as rig, Client(rig.address, timeout=0.2) as client:
        with pytest.raises(euryale.TimedOut, match=r"within 0.2 seconds"):
            client.generate("hello").result()
        wait_until(lambda: rig.engine.cancels == [1])  # the timeout cancels it


def test_a_closed_client(rig):
    client = Client(rig.address)
    generation = client.generate("hello", **LONG)
    client.close()
    client.close()
    with pytest.raises(euryale.ServerLost, match="closed"):
        generation.result()
    with pytest.raises(euryale.ServerLost, match="closed"):
        client.health()


class NewerHello:
    """A hello of version 3."""

    type = "hello"
    schema = MappingProxyType({"v": (wire.Kind("int", int), True)})
    v = 3


def test_a_server_of_another_version(rig):
    with (
        Client(rig.address) as client,
        pytest.raises(euryale.UnsupportedVersion, match="version 3 is not supported, only version 2"),
    ):
        client._call(NewerHello(), protocol.ServerInfo, 5)


def test_a_server_with_invalid_replies():
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")

    def answer():
        delta = protocol.Delta(index=0, tokens=(), text="", tokens_per_step=())
        bodies = [b"\xc1", wire.encode(protocol.Drained()), wire.encode(delta)]
        for body in bodies:
            who, request_id, _ = router.recv_multipart()
            router.send_multipart([who, b"unknown", body])
            router.send_multipart([who])
            router.send_multipart([who, request_id, body])

    thread = threading.Thread(target=answer)
    thread.start()
    with Client(f"tcp://127.0.0.1:{port}", timeout=5) as client:
        with pytest.raises(euryale.ProtocolError, match="cannot be read"):
            client.hello()
        with pytest.raises(euryale.ProtocolError, match="answered hello with drained"):
            client.hello()
        with pytest.raises(euryale.ProtocolError, match="delta out of order"):
            client.generate("hello").result()
    thread.join()
    router.close(0)
    context.term()


@pytest.fixture
def process():
    script = Path(__file__).parents[1] / "serving_rig.py"
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    process.address = process.stdout.readline().strip()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_server_is_noticed_at_once(process):
    with Client(process.address, timeout=60) as client:
        generation, other = client.generate("hello", **LONG), client.generate("world", **LONG)
        deltas = iter(generation)
        next(deltas)
        process.send_signal(signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(euryale.ServerLost, match="broke; requests in flight are lost: send them again"):
            for _ in deltas:
                pass
        with pytest.raises(euryale.ServerLost):
            other.result()
        assert time.monotonic() - start < 5  # the timeout of the request is 60 seconds
        assert generation.partial().tokens


def test_replies_before_a_disconnect_can_still_be_read():
    with serving() as rig, Client(rig.address, timeout=10) as client:
        generation = client.generate("hello", max_tokens=100)
        wait_until(lambda: not rig.engine.running and rig.engine.adds)
        rig.engine.outbox.append(_begin_drain())
        for thread in rig.threads:
            thread.join(10)
        assert len(generation.result().tokens) == 100


def _begin_drain():
    from euryale.frontend.messages import BeginDrain

    return BeginDrain()


def test_reconnecting_to_a_restarted_server(tmp_path):
    address = f"ipc://{tmp_path}/socket"
    with Client(address, timeout=10) as client:
        for _ in range(2):
            with serving(bind=address):
                assert len(client.generate("hello").result().tokens) == 12
    assert list(tmp_path.iterdir()) == []


def test_closing_leaves_no_thread_and_no_socket():
    before = threading.active_count()
    with serving() as rig, Client(rig.address) as client:
        client.hello()
    gc.collect()
    assert threading.active_count() == before
