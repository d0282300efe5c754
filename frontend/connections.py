"""Bounds the connections of the public socket: their number, and the bytes of each one's unfinished message.

ZeroMQ delivers whole messages only and buffers the frames of an unfinished one without limit. This file counts the
bytes that a TCP connection has received since its last whole message, and shuts down connections with too many.
Connections of unix sockets cannot be counted, but only the server's own user can open them.

ZeroMQ also accepts connections until no descriptor is left, and then retries without a pause. If there are too many
connections, the newest are shut down. A filter on the listening socket then drops new ones until enough have closed.
"""

import contextlib
import ctypes
import fcntl
import os
import resource
import socket
import struct
import termios
from collections import deque
from dataclasses import dataclass

MAX_WATCHED = 256  # connections checked in one call
SPARE_DESCRIPTORS = 64  # for other files that the process opens after the start
_BYTES_RECEIVED = 128  # offset in struct tcp_info of linux/tcp.h
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # of asm-generic/socket.h
_DROP_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0)  # struct sock_filter: return 0 bytes of every packet


def most_connections() -> int:
    """Return the number of connections that the process may accept under its limit of open files."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, limit - len(os.listdir("/proc/self/fd")) - SPARE_DESCRIPTORS)


@dataclass(eq=False)
class _Connection:
    """An open connection. ``socket`` belongs to ZeroMQ and is never closed here.

    ``mark``: bytes received up to the last whole message.
    """

    socket: socket.socket
    mark: int = 0
    is_ending: bool = False

    def shut_down(self) -> None:
        """Shut the connection down; ZeroMQ then closes it."""
        self.is_ending = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def received(self) -> int:
        """Return the bytes that ZeroMQ has read so far. Raises OSError if it is closed or not TCP."""
        (received,) = struct.unpack_from(
            "=Q", self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED + 8), _BYTES_RECEIVED
        )
        unread = fcntl.ioctl(self.socket.fileno(), termios.FIONREAD, b"\0" * 4)
        return received - int.from_bytes(unread, "little")


class Connections:
    """All connections by descriptor, as the socket's monitor reports them. ``len()`` counts open connections."""

    def __init__(self, max_unread_bytes: int) -> None:
        """``max_unread_bytes``: maximum bytes received on a connection since its last whole message."""
        self._max_unread_bytes = max_unread_bytes
        self._open: dict[int, _Connection] = {}
        self._turns: deque[tuple[int, _Connection]] = deque()

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, descriptor: int) -> None:
        """Record an accepted connection."""
        self.closed(descriptor)
        with contextlib.suppress(OSError):  # closed in the meantime
            connection = _Connection(_borrow(descriptor))
            self._open[descriptor] = connection
            self._turns.append((descriptor, connection))

    def closed(self, descriptor: int) -> None:
        """Record that a connection was closed."""
        connection = self._open.pop(descriptor, None)
        if connection is not None:
            connection.socket.detach()

    def delivered(self, descriptor: int) -> None:
        """Record a whole message from this connection."""
        connection = self._open.get(descriptor)
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.mark = connection.received()

    def shut_down_senders_of_too_much(self) -> int:
        """Shut down connections with too many bytes since their last whole message and return their number.

        Each call checks up to MAX_WATCHED connections, in turn.
        """
        count = 0
        for _ in range(min(MAX_WATCHED, len(self._turns))):
            descriptor, connection = self._turns.popleft()
            if self._open.get(descriptor) is not connection:
                continue  # gone
            self._turns.append((descriptor, connection))
            with contextlib.suppress(OSError):
                if connection.received() - connection.mark > self._max_unread_bytes:
                    connection.shut_down()
                    count += 1
        return count

    def shut_down_newest(self, most: int) -> None:
        """Shut down all but the ``most`` oldest connections."""
        open_ones = [connection for connection in self._open.values() if not connection.is_ending]
        for connection in open_ones[most:]:
            connection.shut_down()

    def close(self) -> None:
        """Forget all connections without closing them."""
        for descriptor in list(self._open):
            self.closed(descriptor)


def set_refusing(listener: int, is_refusing: bool) -> None:
    """Make the listening socket of this descriptor drop new connections, or accept them again.

    Established connections continue. Has no effect on a unix socket.
    """
    program = ctypes.create_string_buffer(_DROP_ALL, len(_DROP_ALL))
    filters = struct.pack("@HP", 1, ctypes.addressof(program))  # struct sock_fprog
    borrowed = _borrow(listener)
    try:
        with contextlib.suppress(OSError):
            if is_refusing:
                borrowed.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filters)
            else:
                borrowed.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
    finally:
        borrowed.detach()


def _borrow(descriptor: int) -> socket.socket:
    """Return a socket object for a descriptor of ZeroMQ's. Detach it and never close it.

    Its address family may be wrong, which the calls made here ignore.
    """
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=descriptor)
