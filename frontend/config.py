"""The front end's settings, checked once."""

import ipaddress
import os
import stat
from dataclasses import dataclass

from euryale.client import protocol
from euryale.client.rules import Rule, number, whole
from euryale.scheduler.flag import check_flags, flag

MAX_DRAIN_TIMEOUT = 28.0  # torchrun kills its workers 30 seconds after a signal


NETWORK, CLIENTS = "network", "limits for clients"


@dataclass(frozen=True, kw_only=True)
class FrontEndConfig:
    """How the front end listens and what it allows. Every field is a flag of the same name in ``launch/``.

    The protocol has neither encryption nor passwords yet, so an address that other machines can reach needs
    ``allow_remote``. Raises ValueError, with the way to mend it, for a value that cannot work.
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
        "seconds without a sign of life after which the engine counts as dead",
        NETWORK,
        number(0, 86400, "seconds", above=True),
    )
    drain_timeout: float = flag(
        20.0,
        "seconds that running requests have to finish when the server stops; then they are cancelled; at most 28",
        NETWORK,
        Rule(
            f"a number of seconds above 0 and at most {MAX_DRAIN_TIMEOUT:g} (torchrun kills its workers 30 "
            "seconds after it was asked to stop)",
            number(0, MAX_DRAIN_TIMEOUT, above=True).fits,
        ),
    )
    max_queue: int = flag(
        256,
        "most requests in flight, running or waiting; more are answered with 'overloaded'",
        CLIENTS,
        whole(1, 1 << 20, "requests"),
    )
    max_message_bytes: int = flag(
        protocol.DEFAULT_MAX_MESSAGE_BYTES, "largest request in bytes", CLIENTS, whole(1, 1 << 30, "bytes")
    )
    max_backlog_bytes: int = flag(
        4 << 20, "bytes of unread answers after which a client is dropped", CLIENTS, whole(1, 1 << 40, "bytes")
    )

    def __post_init__(self) -> None:
        check_bind(self.bind, allow_remote=self.allow_remote)
        check_flags(self)


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
