"""The public socket: frames in, messages out, and who has gone away. Knows clients by their routing id only."""

import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import zmq

from euryale.client import protocol, wire
from euryale.frontend.config import FrontEndConfig, check_socket_file

# What may wait per client inside ZeroMQ, in messages. Incoming ones can be as large as max_message_bytes.
RECEIVE_HIGH_WATER = 64
SEND_HIGH_WATER = 1_000


@dataclass(kw_only=True)
class Backlog:
    """Messages that one client's queue had no room for."""

    frames: deque[list[bytes]] = field(default_factory=deque)
    num_bytes: int = 0


class ClientPort:
    """A ROUTER that never blocks and never grows without bound."""

    def __init__(self, context: zmq.Context, config: FrontEndConfig) -> None:
        """Listens at ``config.bind``. Raises ValueError if that is impossible."""
        self._config = config
        self.num_clients = 0
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.RCVHWM, RECEIVE_HIGH_WATER)
        self.socket.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER)
        # Above our own limit there is a band in which the sender is told so; beyond it ZeroMQ hangs up.
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * config.max_message_bytes)
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, protocol.HEARTBEAT_INTERVAL_MS)
        self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, protocol.HEARTBEAT_TIMEOUT_MS)
        self.socket.setsockopt(zmq.HEARTBEAT_TTL, protocol.HEARTBEAT_TIMEOUT_MS)
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, protocol.HANDSHAKE_INTERVAL_MS)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._backlogs: dict[bytes, Backlog] = {}
        self._gone: set[bytes] = set()
        self._socket_file: str | None = None
        try:
            self.endpoint = self._bind(config.bind)
        except (ValueError, zmq.ZMQError) as error:
            self.close()
            raise ValueError(f"cannot listen at {config.bind!r}: {error}") from None

    def _bind(self, address: str) -> str:
        if address.startswith("tcp://["):
            self.socket.setsockopt(zmq.IPV6, 1)
        check_socket_file(address)
        if _is_listening(address):
            raise ValueError("another server listens there")
        self.socket.bind(address)
        endpoint = self.socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
        path = endpoint.removeprefix("ipc://")
        if path != endpoint and path[0] != "@":
            os.chmod(path, 0o600)
            self._socket_file = path
        return endpoint

    def receive(self, limit: int) -> Iterator[list[bytes]]:
        """Up to ``limit`` messages that are there: routing id first, then the client's frames."""
        with contextlib.suppress(zmq.Again):
            for _ in range(limit):
                yield self.socket.recv_multipart(zmq.DONTWAIT)

    def send(self, client: bytes, request_id: bytes, message: Any) -> None:
        """Sends, or keeps the message until the client has room for it, or finds the client gone."""
        if client in self._gone:
            return
        frames = [client, request_id, wire.encode(message)]
        backlog = self._backlogs.get(client)
        if backlog is None:
            if self._try(frames):
                return
            if client in self._gone:
                return
            backlog = self._backlogs[client] = Backlog()
        backlog.frames.append(frames)
        backlog.num_bytes += len(frames[2])
        if backlog.num_bytes > self._config.max_backlog_bytes:
            self._give_up(client)

    def _give_up(self, client: bytes) -> None:
        """A reader too slow is treated like one that left, but finds out should it read again."""
        error = protocol.Error(code="slow_reader", message="answers were left unread for too long; all were dropped")
        self._backlogs[client] = Backlog(frames=deque([[client, b"", wire.encode(error)]]))
        self._gone.add(client)

    def retry(self) -> None:
        """Tries again to send what clients had no room for."""
        for client, backlog in list(self._backlogs.items()):
            while backlog.frames and self._try(backlog.frames[0]):
                backlog.num_bytes -= len(backlog.frames.popleft()[2])
            if not backlog.frames:
                self._backlogs.pop(client, None)

    def _try(self, frames: list[bytes]) -> bool:
        try:
            self.socket.send_multipart(frames, zmq.DONTWAIT)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._backlogs.pop(frames[0], None)
            self._gone.add(frames[0])
            return False
        return True

    @property
    def has_backlog(self) -> bool:
        """Whether messages wait that ``retry`` should try to send."""
        return bool(self._backlogs)

    def take_gone(self) -> set[bytes]:
        """The clients that were found gone since the last call."""
        gone, self._gone = self._gone, set()
        return gone

    def read_monitor(self) -> bool:
        """Counts the clients; True if a connection broke. Which one, only sending can tell."""
        broke = False
        with contextlib.suppress(zmq.Again):
            while True:
                event, _ = struct.unpack("=hi", self.monitor.recv_multipart(zmq.DONTWAIT)[0])
                broke = broke or event == zmq.EVENT_DISCONNECTED
                self.num_clients += 1 if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else -1
        self.num_clients = max(0, self.num_clients)  # a connection can break before its handshake
        return broke

    def close(self, linger_ms: int = 0) -> None:
        """Closes the socket, giving the last messages ``linger_ms`` to leave; an ipc file goes with it."""
        if not self.socket.closed:
            self.socket.disable_monitor()
            self.monitor.close(0)
            self.socket.close(linger_ms)
            if self._socket_file is not None:  # ZeroMQ leaves it
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._socket_file)


def _is_listening(address: str) -> bool:
    """Whether somebody answers at this ipc path; ZeroMQ would take it over from a living server."""
    path = address.removeprefix("ipc://")
    if path == address or path[0] in "*@" or not os.path.exists(path):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
