"""The public socket: receives frames, sends messages and finds clients that left. Knows clients by routing id only."""

import contextlib
import ctypes
import logging
import math
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import zmq

from euryale.client import protocol, wire
from euryale.frontend.config import FrontEndConfig, check_socket_file
from euryale.frontend.connections import Connections, most_connections, set_refusing

logger = logging.getLogger("euryale.frontend")

# Messages per client that ZeroMQ may queue. Incoming ones can be as large as max_message_bytes.
RECEIVE_HIGH_WATER = 1
SEND_HIGH_WATER = 1_000
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
KEPT_FRAMES = 4  # of a message: routing id, request id, body, and one that marks a message with more
MAX_TURN_FRAMES = 500  # read in one turn; a message with more takes several turns
MANY_FRAMES = 50_000  # of one message, after which freed memory is returned to the system
TRIM_DELAY = 1.0  # seconds until ZeroMQ has freed the memory of a connection or a message
FREED_CONNECTIONS = 8  # closed when no descriptor is left, to free some for other uses
WATCH_INTERVAL = 0.1  # seconds between checks of what connections have sent


@dataclass(kw_only=True)
class Backlog:
    """Messages to one client that its ZeroMQ queue had no room for."""

    frames: deque[list[bytes]] = field(default_factory=deque)
    num_bytes: int = 0


class ClientPort:
    """A ROUTER socket that never blocks and whose memory is bounded."""

    def __init__(self, context: zmq.Context, config: FrontEndConfig) -> None:
        """Listen at ``config.bind``. Raises ValueError if that is impossible."""
        self._config = config
        self.num_clients = 0
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.RCVHWM, RECEIVE_HIGH_WATER)
        self.socket.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER)
        # Messages above max_message_bytes get an error. Above twice that, ZeroMQ closes the connection.
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * config.max_message_bytes)  # of one frame
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, protocol.HEARTBEAT_INTERVAL_MS)
        self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, protocol.HEARTBEAT_TIMEOUT_MS)
        self.socket.setsockopt(zmq.HEARTBEAT_TTL, protocol.HEARTBEAT_TIMEOUT_MS)
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, protocol.HANDSHAKE_INTERVAL_MS)
        self.monitor = self.socket.get_monitor_socket(
            zmq.EVENT_LISTENING
            | zmq.EVENT_ACCEPTED
            | zmq.EVENT_ACCEPT_FAILED
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | HANDSHAKE_FAILED
            | zmq.EVENT_DISCONNECTED
        )
        # A client that follows the protocol has fewer unread bytes: part of the largest body and its request id.
        self._connections = Connections(2 * config.max_message_bytes + (64 << 10))
        self._max_connections = most_connections()
        self._is_full = False
        self._listener = -1  # descriptor
        self._next_watch = 0.0
        self._next_trim = math.inf
        self._frames: list[bytes] = []  # of the message being read
        self._num_frames = 0
        self._backlogs: dict[bytes, Backlog] = {}
        self._gone: set[bytes] = set()
        self._socket_file: str | None = None
        try:
            self.endpoint = self._bind(config.bind)
        except (ValueError, zmq.ZMQError) as error:
            self.close()
            reason = str(error)
            if isinstance(error, zmq.ZMQError):  # whose text repeats the address
                reason = f"{zmq.strerror(error.errno or 0)}: give --bind another address"
            raise ValueError(f"cannot listen at {config.bind!r}: {reason}") from None

    def _bind(self, address: str) -> str:
        if address.startswith("tcp://["):
            self.socket.setsockopt(zmq.IPV6, 1)
        check_socket_file(address)
        if _is_listening(address):
            raise ValueError("another server listens there: stop it, or give --bind another address")
        self.socket.bind(address)
        endpoint = self.socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
        path = endpoint.removeprefix("ipc://")
        if path != endpoint and path[0] != "@":
            os.chmod(path, 0o600)
            self._socket_file = path
        return endpoint

    def receive(self, limit: int) -> Iterator[list[bytes]]:
        """Yield up to ``limit`` received messages: routing id, then the client's frames.

        Of a message with more than three frames after the routing id only the first three are kept, the last one empty.
        """
        with contextlib.suppress(zmq.Again):
            for _ in range(limit):
                message = self._read_message()
                if message is None:
                    return
                yield message

    def _read_message(self) -> list[bytes] | None:
        """Read the next message; None if it has so many frames that the next call has to continue."""
        for _ in range(MAX_TURN_FRAMES):
            frame = self.socket.recv(zmq.DONTWAIT, copy=False)
            self._num_frames += 1
            if self._num_frames < KEPT_FRAMES:
                self._frames.append(frame.bytes)
            elif self._num_frames == KEPT_FRAMES:
                self._frames.append(b"")
            if not frame.more:
                self._connections.delivered(frame.get(zmq.SRCFD))
                if self._num_frames > MANY_FRAMES:
                    self._next_trim = time.monotonic() + TRIM_DELAY
                message, self._frames, self._num_frames = self._frames, [], 0
                return message
        return None

    def send(self, client: bytes, request_id: bytes, message: Any) -> None:
        """Send ``message``, or queue it until the client has room. Does nothing for a client that is gone."""
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
        """Treat a client that reads too slowly like one that left. It gets one error if it reads again."""
        text = (
            "too many answers were unread, so all requests of this connection were dropped: read faster, or raise "
            "--max-backlog-bytes"
        )
        error = protocol.Error(code="slow_reader", message=text)
        self._backlogs[client] = Backlog(frames=deque([[client, b"", wire.encode(error)]]))
        self._gone.add(client)

    def retry(self) -> None:
        """Try again to send queued messages."""
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
        """Whether ``retry`` has messages to send."""
        return bool(self._backlogs)

    def take_gone(self) -> set[bytes]:
        """Return the clients that were found gone since the last call."""
        gone, self._gone = self._gone, set()
        return gone

    def read_monitor(self) -> bool:
        """Count clients and connections. Returns whether a connection closed; only sending reveals whose it was."""
        broke = failed = False
        with contextlib.suppress(zmq.Again):
            while True:
                event, value = struct.unpack("=hi", self.monitor.recv_multipart(zmq.DONTWAIT)[0])
                if event == zmq.EVENT_LISTENING:
                    self._listener = value
                elif event == zmq.EVENT_ACCEPTED:
                    self._connections.opened(value)
                elif event == zmq.EVENT_ACCEPT_FAILED:
                    failed = True
                elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self.num_clients += 1
                elif event & HANDSHAKE_FAILED:
                    self.num_clients += 1  # not a client, but its disconnection will be counted as one
                elif event == zmq.EVENT_DISCONNECTED:
                    broke = True
                    self.num_clients -= 1
                    self._connections.closed(value)
        self.num_clients = max(0, self.num_clients)
        self._bound_connections(failed)
        return broke

    def watch(self, now: float) -> None:
        """Shut down connections that send endless messages. Call it at least every ``watch_delay`` seconds."""
        if now >= self._next_watch:
            self._next_watch = now + WATCH_INTERVAL
            if count := self._connections.shut_down_senders_of_too_much():
                logger.warning("shut down %d connections that sent too much for one message", count)
                self._next_trim = now + TRIM_DELAY
        if now >= self._next_trim:
            self._next_trim = math.inf
            _trim_memory()

    @property
    def watch_delay(self) -> float:
        """Seconds until ``watch`` must be called again, at most."""
        return WATCH_INTERVAL if self._connections or self._next_trim < math.inf else math.inf

    def _bound_connections(self, accepting_failed: bool) -> None:
        """Refuse new connections while there are too many, and shut down the newest ones above the limit."""
        if accepting_failed and not self._is_full:  # fewer descriptors than expected
            self._max_connections = max(1, len(self._connections) - FREED_CONNECTIONS)
        is_full = len(self._connections) > self._max_connections * (15 / 16 if self._is_full else 1)
        if is_full:
            self._connections.shut_down_newest(self._max_connections)
        if is_full != self._is_full:
            self._is_full = is_full
            set_refusing(self._listener, is_full)
            text = (
                "no more connections than %d are accepted"
                if is_full
                else "fewer than %d connections: more are accepted"
            )
            logger.warning(text, self._max_connections)

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket and remove its ipc file. Queued messages get ``linger_ms`` to be sent."""
        if not self.socket.closed:
            self._connections.close()
            self.socket.disable_monitor()
            self.monitor.close(0)
            self.socket.close(linger_ms)
            if self._socket_file is not None:  # ZeroMQ does not remove it
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._socket_file)


def _is_listening(address: str) -> bool:
    """Whether a server listens at this ipc path. ZeroMQ would silently replace its socket."""
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


def _trim_memory() -> None:
    """Make the C library return free memory to the system, if it can."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
