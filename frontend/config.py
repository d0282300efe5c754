"""The front end's settings, from which its flags are generated."""

import ipaddress
import os
import stat
from dataclasses import dataclass

from euryale.client import protocol
from euryale.client.rules import Rule, number, whole
from euryale.scheduler.flag import check_flags, flag

MAX_DRAIN_TIMEOUT = 28.0  # seconds; torchrun kills its workers 30 seconds after a signal

NETWORK, CLIENTS = "network", "limits for clients"


@dataclass(frozen=True, kw_only=True)
class FrontEndConfig:
    """Address and limits of the front end. Every field is a flag of the same name in ``launch/``.

    The protocol has no encryption and no passwords, so an address that other machines can reach needs ``allow_remote``.
    Raises ValueError, naming the flag and the remedy, for a value that cannot work.
    """

    bind: str = flag(
        protocol.DEFAULT_ADDRESS, "address to listen at: tcp://host:port (port 0: any free one) or ipc://path", NETWORK
    )
    allow_remote: bool = flag(
        False,
        "allow an address that other machines can reach; there is no encryption and no password",
        NETWORK,
    )
    engine_timeout: float = flag(
        60.0,
        "seconds without a message after which the engine is considered dead",
        NETWORK,
        number(0, 86400, "seconds", above=True),
    )
    drain_timeout: float = flag(
        20.0,
        "seconds that requests have to finish when the server stops before they are cancelled; at most 28",
        NETWORK,
        Rule(
            f"a number of seconds above 0 and at most {MAX_DRAIN_TIMEOUT:g} (torchrun kills its workers 30 "
            "seconds after it was asked to stop)",
            number(0, MAX_DRAIN_TIMEOUT, above=True).fits,
        ),
    )
    max_queue: int = flag(
        256,
        "maximum number of requests in flight, running or waiting; others get the error 'overloaded'",
        CLIENTS,
        whole(1, 1 << 20, "requests"),
    )
    max_message_bytes: int = flag(
        protocol.DEFAULT_MAX_MESSAGE_BYTES, "maximum size of a request in bytes", CLIENTS, whole(1, 1 << 30, "bytes")
    )
    max_backlog_bytes: int = flag(
        4 << 20, "bytes of unread answers above which a client is dropped", CLIENTS, whole(1, 1 << 40, "bytes")
    )

    def __post_init__(self) -> None:
        check_bind(self.bind, allow_remote=self.allow_remote)
        check_flags(self)


def check_bind(address: str, *, allow_remote: bool) -> None:
    """Raise ValueError if ``address`` is malformed, or if other machines can reach it without ``allow_remote``."""
    transport, _, place = address.partition("://")
    if transport == "ipc" and place:
        return
    host, _, port = place.rpartition(":")
    if transport != "tcp" or not host or not (port == "*" or (port.isdecimal() and int(port) < 65536)):
        raise ValueError(f"--bind must be tcp://host:port or ipc://path, not {address!r}")
    if not allow_remote and not _is_loopback(host):
        raise ValueError(
            f"--bind {address!r} can be reached from other machines, and there is no encryption or password: "
            "use tcp://127.0.0.1:port or ipc://path, or give --allow-remote"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name, an interface or all interfaces


def check_socket_file(address: str) -> None:
    """Raise ValueError if binding ``address`` would delete a file that is not a socket, since ZeroMQ unlinks any file
    there.

    A socket file of a killed server may be replaced. That of a running server may not, but only connecting can tell
    them apart.
    """
    path = address.removeprefix("ipc://")
    if path == address or path[0] in "*@" or not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ValueError("the file exists and is not a socket: remove it or give --bind another path")
