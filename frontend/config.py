"""The front end's settings, checked once."""

import ipaddress
import os
import stat
from dataclasses import dataclass, field
from typing import Any

from euryale.client import protocol

MAX_DRAIN_TIMEOUT = 28.0  # torchrun kills its workers 30 seconds after a signal


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help, "choices": None})


@dataclass(frozen=True, kw_only=True)
class FrontEndConfig:
    """How the front end listens and what it allows. Every field is a flag of the same name in ``launch/``.

    The protocol has neither encryption nor passwords yet, so an address that other machines can reach needs
    ``allow_remote``. Raises ValueError, with the way to mend it, for a value that cannot work.
    """

    bind: str = _flag(protocol.DEFAULT_ADDRESS, "tcp://host:port (port 0: any free one) or ipc://path to listen at")
    allow_remote: bool = _flag(False, "listen at addresses that other machines can reach, without any protection")
    max_queue: int = _flag(256, "requests in flight, running or waiting; beyond that the answer is 'overloaded'")
    max_message_bytes: int = _flag(protocol.DEFAULT_MAX_MESSAGE_BYTES, "size of the largest request")
    max_backlog_bytes: int = _flag(4 << 20, "unread answers after which a client is given up")
    engine_timeout: float = _flag(60.0, "seconds of silence after which the engine is taken for dead")
    drain_timeout: float = _flag(
        20.0, "seconds after the begin of a drain when running requests are cancelled; below 30"
    )

    def __post_init__(self) -> None:
        check_bind(self.bind, allow_remote=self.allow_remote)
        for name in ("max_queue", "max_message_bytes", "max_backlog_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("engine_timeout", "drain_timeout"):
            if not getattr(self, name) > 0:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} must be a positive number of seconds, not {getattr(self, name)}")
        if self.drain_timeout > MAX_DRAIN_TIMEOUT:
            raise ValueError(
                f"--drain-timeout must be at most {MAX_DRAIN_TIMEOUT:.0f} seconds, not {self.drain_timeout}: torchrun "
                "kills its workers 30 seconds after it was asked to stop, and answers in progress with them"
            )


def check_bind(address: str, *, allow_remote: bool) -> None:
    """Raises ValueError if ``address`` is none to listen at, or can be reached from elsewhere without leave."""
    transport, _, place = address.partition("://")
    if transport == "ipc" and place:
        return
    host, _, port = place.rpartition(":")
    if transport != "tcp" or not host or not (port == "*" or (port.isdecimal() and int(port) < 65536)):
        raise ValueError(f"cannot listen at {address!r}: use tcp://host:port or ipc://path")
    if not allow_remote and not _is_loopback(host):
        raise ValueError(
            f"{address!r} can be reached from other machines, and nothing protects it yet: "
            "use tcp://127.0.0.1:port or ipc://path, or allow remote clients explicitly (--allow-remote)"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name, an interface, or all of them


def check_socket_file(address: str) -> None:
    """Raises ValueError if binding ``address`` would delete a file that is no socket: ZeroMQ unlinks whatever is there.

    A socket file that a killed server left behind may be replaced. One that a living server listens at may not; that
    can only be found out by connecting.
    """
    path = address.removeprefix("ipc://")
    if path == address or path[0] in "*@" or not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ValueError(f"cannot listen at {address!r}: the file exists and is no socket; remove it or use another")
