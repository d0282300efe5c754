"""The socket pair between the front end's process and the engine's.

The engine binds in a directory of its own that only its user may enter. It removes the directory once the front end has
connected, so that no file is left whichever process dies.
"""

import contextlib
import os
import shutil
import struct
import tempfile
from typing import Any

import zmq

from euryale.client import wire
from euryale.frontend.messages import TO_ENGINE, TO_FRONT_END

MAX_SOCKET_DIRECTORY = 70  # bytes; the path of a unix socket ends at 107


class LinkLost(ConnectionError):
    """The process at the other end is gone."""


class _Link:
    """One end of the socket pair, for use by one thread.

    ``lost``: the other process is gone. Messages that it sent before can still be received.
    """

    def __init__(self, incoming: dict[str, type]) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.linger = 0
        # Without a high-water mark, because neither process may wait for the other. The front end bounds the queues: it
        # limits the requests in flight, and with them the messages.
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.lost = False
        self._incoming = incoming

    def send(self, message: Any) -> None:
        """Send without waiting. Raises LinkLost if the other process is gone."""
        # The socket alone does not suffice: shortly after a loss it still accepts messages that nobody will read.
        if not self.lost:
            with contextlib.suppress(zmq.Again):
                self.socket.send(wire.encode(message), zmq.DONTWAIT)
                return
        raise LinkLost("the process at the other end of the link is gone")

    def receive(self, timeout_ms: int = 0) -> list[Any]:
        """Return all received messages in order, after waiting up to ``timeout_ms`` milliseconds for the first one.

        Stops waiting when the other process dies; see ``lost``.
        """
        if timeout_ms and not self.lost and not self.socket.poll(0):
            poller = zmq.Poller()
            poller.register(self.socket, zmq.POLLIN)
            poller.register(self.monitor, zmq.POLLIN)
            poller.poll(timeout_ms)
        lost = self._read_monitor()  # before reading messages, so that none sent before the loss is missed
        messages = []
        with contextlib.suppress(zmq.Again):
            while True:
                messages.append(
                    wire.build(wire.unpack_map(self.socket.recv(zmq.DONTWAIT)), self._incoming, strict=True)
                )
        self.lost = self.lost or lost
        return messages

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket. Queued messages get ``linger_ms`` to be sent. May be called twice."""
        if not self.socket.closed:
            self.socket.disable_monitor()
            self.monitor.close(0)
            self.socket.close(linger_ms)
            self.context.term()

    def _read_monitor(self) -> bool:
        lost = False
        with contextlib.suppress(zmq.Again):
            while True:
                event, _ = struct.unpack("=hi", self.monitor.recv_multipart(zmq.DONTWAIT)[0])
                lost = lost or event == zmq.EVENT_DISCONNECTED
        return lost


class EngineLink(_Link):
    """The engine's end. Binds at ``endpoint``, which the front end's process gets as an argument."""

    def __init__(self) -> None:
        super().__init__(TO_ENGINE)
        base = tempfile.gettempdir()
        self._directory: str | None = tempfile.mkdtemp(
            prefix="euryale-", dir=base if len(os.fsencode(base)) < MAX_SOCKET_DIRECTORY else "/tmp"
        )
        self.endpoint = f"ipc://{self._directory}/link"
        self.socket.bind(self.endpoint)

    def receive(self, timeout_ms: int = 0) -> list[Any]:
        """Receive as ``_Link.receive`` does. The first message removes the directory of the endpoint."""
        messages = super().receive(timeout_ms)
        if messages:
            self._remove_directory()
        return messages

    def close(self, linger_ms: int = 1000) -> None:
        """Close the socket and remove its files. Queued messages get ``linger_ms`` to be sent."""
        super().close(linger_ms)
        self._remove_directory()

    def _remove_directory(self) -> None:
        directory, self._directory = self._directory, None
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


class FrontEndLink(_Link):
    """The front end's end. Connects to the engine's ``endpoint``."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(TO_FRONT_END)
        self.socket.connect(endpoint)
