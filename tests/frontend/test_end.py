"""How serving ends, and where a front end listens."""

import contextlib
import socket
import threading
import time

import pytest
from serving_rig import INFO, RawClient, front_end, serving, wait_until

from euryale import client as euryale
from euryale.client import Client, protocol
from euryale.frontend import messages
from euryale.frontend.engine_link import EngineLink

LONG = {"max_tokens": 150}


def test_drain_finishes_what_runs():
    with serving() as rig, Client(rig.address, timeout=10) as client, Client(rig.address, timeout=10) as other:
        rig.engine.pause = 0.02
        running = client.generate("hello", max_tokens=60)
        wait_until(lambda: rig.engine.running)
        with RawClient(rig.address) as raw:
            raw.request(b"d1", type="drain")
            raw.request(b"d2", type="drain")
            raw.request(b"d1", type="drain")
            assert raw.receive()[1].code == "duplicate_request_id"
            assert client.health().status == "draining"
            with pytest.raises(euryale.Draining):
                other.generate("world").result()
            assert len(running.result().tokens) == 60
            assert [raw.receive() for _ in range(2)] == [(b"d1", protocol.Drained()), (b"d2", protocol.Drained())]
        wait_until(lambda: rig.outcome == ["drained"])


@pytest.mark.parametrize("how", ["engine", "flag"])
def test_drain_without_a_client(how):
    with serving() as rig, Client(rig.address, timeout=10) as client:
        rig.engine.pause = 0.01
        running = client.generate("hello", max_tokens=60)
        wait_until(lambda: rig.engine.running)
        if how == "engine":
            rig.engine.outbox.append(messages.BeginDrain())
        else:
            rig.frontend.begin_drain()
        assert len(running.result().tokens) == 60
        wait_until(lambda: rig.outcome == ["drained"])


def test_a_drain_does_not_wait_for_ever():
    with serving(hold=True, drain_timeout=0.2) as rig, Client(rig.address, timeout=10) as client:
        running = client.generate("hello")
        wait_until(lambda: rig.engine.adds)
        client.drain()
        with pytest.raises(euryale.Cancelled):
            running.result()
        wait_until(lambda: rig.outcome == ["drained"])


@pytest.mark.parametrize("how", ["dies", "silent"])
def test_the_engine_is_lost(how):
    with serving(hold=True, engine_timeout=30.0 if how == "dies" else 1.0) as rig:
        with Client(rig.address, timeout=10) as client:
            running = [client.generate("hello") for _ in range(2)]
            wait_until(lambda: len(rig.engine.adds) == 2)
            start = time.monotonic()
            setattr(rig.engine, how, True)
            for generation in running:
                with pytest.raises(euryale.GroupLost, match="the model's processes are lost"):
                    generation.result()
            assert time.monotonic() - start < 3
        wait_until(lambda: rig.outcome == ["group_lost"])


def test_an_engine_that_says_nothing_at_all():
    with contextlib.closing(EngineLink()) as link:
        frontend = front_end(link, engine_timeout=0.3)
        assert frontend.run() == "group_lost"


def test_clients_wait_while_the_engine_loads_however_long():
    with contextlib.closing(EngineLink()) as link:
        frontend = front_end(link, engine_timeout=0.3)
        outcome: list[str] = []
        thread = threading.Thread(target=lambda: outcome.append(frontend.run()))
        thread.start()
        assert link.receive(5000) == [messages.Attach(endpoint=frontend.endpoint)]
        link.send(messages.Loading())
        with Client(frontend.endpoint) as client:
            with pytest.raises(euryale.TimedOut):
                client.hello(timeout=1.0)  # more than three times as long as an engine may be silent
            link.send(messages.Welcome(info=INFO))
            assert client.hello().model == "scripted"
            wait_until(lambda: outcome == ["group_lost"])  # the engine has nothing more to say


def test_an_ipc_socket_is_private_and_removed(tmp_path):
    path = tmp_path / "socket"
    with serving(bind=f"ipc://{path}") as rig:
        assert rig.address == f"ipc://{path}"
        assert path.stat().st_mode & 0o777 == 0o600
        with Client(rig.address) as client:
            assert client.generate("hello").text()
    assert not path.exists()


def test_addresses_in_use(tmp_path):
    with contextlib.closing(EngineLink()) as link:
        with serving() as rig, pytest.raises(ValueError, match="Address already in use"):
            front_end(link, bind=rig.address)
        with serving(bind=f"ipc://{tmp_path}/socket") as rig:
            with pytest.raises(ValueError, match="another server listens there"):
                front_end(link, bind=rig.address)
            with Client(rig.address) as client:
                assert client.health().status == "ok"
        file = tmp_path / "file"
        file.write_text("precious")
        with pytest.raises(ValueError, match="the file exists and is not a socket"):
            front_end(link, bind=f"ipc://{file}")
        assert file.read_text() == "precious"


def test_a_socket_file_left_by_a_killed_server_is_replaced(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(bind=f"ipc://{path}") as rig, Client(rig.address) as client:
        assert client.health().status == "ok"
