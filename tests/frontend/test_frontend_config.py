"""Where a front end may listen."""

import dataclasses

import pytest

from euryale.frontend.config import FrontEndConfig


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:5555",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:*",
        "tcp://127.5.5.5:80",
        "tcp://localhost:5555",
        "tcp://[::1]:5555",
        "ipc:///run/euryale",
        "ipc://relative/path",
    ],
)
def test_local_addresses(address):
    assert FrontEndConfig(bind=address).bind == address


@pytest.mark.parametrize(
    "address",
    ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://10.0.0.1:1", "tcp://eth0:1", "tcp://[::]:1", "tcp://host:1"],
)
def test_remote_addresses_need_leave(address):
    with pytest.raises(ValueError, match="can be reached from other machines, and there is no encryption or password"):
        FrontEndConfig(bind=address)
    assert FrontEndConfig(bind=address, allow_remote=True).bind == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "5555",
        "localhost:5555",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:x",
        "tcp://127.0.0.1:99999",
        "ipc://",
        "udp://127.0.0.1:5",
    ],
)
def test_no_addresses(address):
    with pytest.raises(ValueError, match="--bind must be tcp://host:port or ipc://path, not"):
        FrontEndConfig(bind=address, allow_remote=True)


@pytest.mark.parametrize(
    "name", ["max_queue", "max_message_bytes", "max_backlog_bytes", "engine_timeout", "drain_timeout"]
)
def test_numbers(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be"):
        FrontEndConfig(**{name: 0})


def test_a_drain_longer_than_torchrun_waits_is_refused():
    with pytest.raises(ValueError, match="torchrun kills its workers 30 seconds after"):
        FrontEndConfig(drain_timeout=29)


def test_every_field_says_what_it_is_for():
    assert all(field.metadata["help"] for field in dataclasses.fields(FrontEndConfig))
