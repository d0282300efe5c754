"""The link between front end and engine: messages, and the death of either process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from euryale.client import wire
from euryale.frontend import messages
from euryale.frontend.engine_link import EngineLink, FrontEndLink, LinkLost
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_result import RequestOutput

PARAMS = SamplingParams(
    max_tokens=7,
    temperature=0.5,
    seed=2**64 - 1,
    stop=("a", "é"),
    stop_token_ids=(1, 2),
    speculation=False,
    priority=-3,
)
TO_ENGINE = [
    messages.Attach(endpoint="tcp://127.0.0.1:1"),
    messages.Failed(reason="the address is in use"),
    messages.AddRequest(keys=(2**40, 2**40 + 1), prompt=wire.pack_tokens((1, 2, 2**31 - 1)), params=PARAMS),
    messages.AddRequest(keys=(1,), prompt=b"\5\0\0\0", params=SamplingParams()),
    messages.CancelRequest(key=3),
    messages.Drain(),
]
TO_FRONT_END = [
    messages.Loading(),
    messages.Welcome(info={"model": "m", "max_model_len": 10, "defaults": {"stop_token_ids": [1]}}),
    messages.StepOutput(outputs=(RequestOutput(1, [5, 6], None), RequestOutput(2, [], "cancelled"))),
    messages.StepOutput(outputs=()),
    messages.Rejected(key=1, code="invalid_request", message="no"),
    messages.Stats(values={"steps": 1, "rate": 0.5}),
    messages.BeginDrain(),
    messages.Drained(),
]


@pytest.fixture
def engine():
    engine = EngineLink()
    yield engine
    engine.close()


@pytest.fixture
def pair(engine):
    front_end = FrontEndLink(engine.endpoint)
    yield engine, front_end
    front_end.close()


def receive(end, count):
    messages = []
    deadline = time.monotonic() + 10
    while len(messages) < count and time.monotonic() < deadline:
        messages += end.receive(100)
    return messages


def test_every_message_arrives_in_order(pair):
    engine, front_end = pair
    for message in TO_ENGINE:
        front_end.send(message)
    assert receive(engine, len(TO_ENGINE)) == TO_ENGINE
    for message in TO_FRONT_END:
        engine.send(message)
    assert receive(front_end, len(TO_FRONT_END)) == TO_FRONT_END
    assert {message.type for message in TO_ENGINE} == set(messages.TO_ENGINE)
    assert {message.type for message in TO_FRONT_END} == set(messages.TO_FRONT_END)


def test_nobody_ever_waits(pair):
    engine, front_end = pair
    front_end.send(messages.Attach(endpoint=""))
    receive(engine, 1)
    output = messages.StepOutput(outputs=[RequestOutput(key, [1, 2, 3], None) for key in range(50)])
    for _ in range(1500):  # far more than the default high-water mark, with nobody reading
        engine.send(output)
    assert len(receive(front_end, 1500)) == 1500


def test_receive_waits_and_returns(pair):
    engine, _ = pair
    start = time.monotonic()
    assert engine.receive() == []
    assert engine.receive(100) == []
    assert time.monotonic() - start >= 0.09  # poll counts whole milliseconds


def test_the_directory_is_private_and_goes_with_the_first_message(pair):
    engine, front_end = pair
    directory = Path(engine.endpoint.removeprefix("ipc://")).parent
    assert directory.stat().st_mode & 0o777 == 0o700
    front_end.send(messages.Attach(endpoint=""))
    receive(engine, 1)
    assert not directory.exists()
    engine.send(messages.Drained())  # the connection lives on
    assert receive(front_end, 1) == [messages.Drained()]


def test_the_directory_goes_when_nobody_came(engine):
    directory = Path(engine.endpoint.removeprefix("ipc://")).parent
    with pytest.raises(LinkLost):
        engine.send(messages.BeginDrain())
    engine.close()
    engine.close()
    assert not directory.exists()


def test_a_long_temporary_directory(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    engine = EngineLink()  # a socket's path has at most 107 bytes
    directory = Path(engine.endpoint.removeprefix("ipc://")).parent
    assert directory.exists()
    assert long not in directory.parents
    engine.close()
    assert not directory.exists()


PEER = """
import os, sys, time
sys.path.append(sys.argv[1])
from euryale.frontend import messages
from euryale.frontend.engine_link import EngineLink, FrontEndLink, LinkLost
end = FrontEndLink(sys.argv[2])
end.send(messages.Attach(endpoint="x"))
end.receive(10_000)
end.send(messages.CancelRequest(key=1))
time.sleep(0.2)
os.kill(os.getpid(), 9)
"""


def test_a_killed_front_end_is_noticed_after_its_last_message(engine):
    root = str(Path(__file__).resolve().parents[2] / "src")
    with subprocess.Popen([sys.executable, "-c", PEER, root, engine.endpoint], env=os.environ):
        assert receive(engine, 1) == [messages.Attach(endpoint="x")]
        assert not engine.lost
        engine.send(messages.Welcome(info={}))
        assert receive(engine, 1) == [messages.CancelRequest(key=1)]
        start = time.monotonic()
        while not engine.lost:
            assert engine.receive(10_000) == []  # returns as soon as the other end dies
        assert time.monotonic() - start < 5
    with pytest.raises(LinkLost):
        engine.send(messages.Drained())


def test_an_engine_that_ends_is_noticed_after_its_last_message(pair):
    engine, front_end = pair
    front_end.send(messages.Attach(endpoint=""))
    receive(engine, 1)
    engine.send(messages.Drained())
    engine.close()
    assert receive(front_end, 1) == [messages.Drained()]
    front_end.receive(1000)
    assert front_end.lost
