"""The connections of the public socket: how many there are, and what each has sent that is no whole message yet.

ZeroMQ hands over whole messages only and keeps the frames of an unfinished one without any limit. So the bytes that a
TCP connection has received since its last whole message are watched, and one with too many is shut down. Connections
of unix sockets cannot be watched; only the server's own user can open them.

ZeroMQ also accepts connections until there is no descriptor left, and then tries again without a pause. So the newest
are shut down where there are too many, and until some have left a filter drops what asks the listening socket for more.
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

MAX_WATCHED = 256  # connections looked at in one call
SPARE_DESCRIPTORS = 64  # for all else that the process opens after the start
_BYTES_RECEIVED = 128  # offset in struct tcp_info of linux/tcp.h
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # of asm-generic/socket.h
_DROP_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0)  # struct sock_filter: return 0 bytes of every packet


def most_connections() -> int:
    """How many connections the process may accept under its limit of open files, beside what is open now."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, limit - len(os.listdir("/proc/self/fd")) - SPARE_DESCRIPTORS)


@dataclass(eq=False)
class _Connection:
    """``socket`` is ZeroMQ's and never closed here. ``mark``: bytes received up to the last whole message."""

    socket: socket.socket
    mark: int = 0
    is_ending: bool = False

    def shut_down(self) -> None:
        self.is_ending = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def received(self) -> int:
        """Bytes that ZeroMQ has taken from the connection so far. Raises OSError if it is closed, or not TCP."""
        (received,) = struct.unpack_from(
            "=Q", self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED + 8), _BYTES_RECEIVED
        )
        unread = fcntl.ioctl(self.socket.fileno(), termios.FIONREAD, b"\0" * 4)
        return received - int.from_bytes(unread, "little")


class Connections:
    """All connections by descriptor, as the socket's monitor tells them. ``len()``: those that are open."""

    def __init__(self, max_unread_bytes: int) -> None:
        """``max_unread_bytes``: what a connection may have sent since its last whole message."""
        self._max_unread_bytes = max_unread_bytes
        self._open: dict[int, _Connection] = {}
        self._turns: deque[tuple[int, _Connection]] = deque()

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, descriptor: int) -> None:
        """Note an accepted connection."""
        self.closed(descriptor)
        with contextlib.suppress(OSError):  # closed meanwhile
            connection = _Connection(_borrow(descriptor))
            self._open[descriptor] = connection
            self._turns.append((descriptor, connection))

    def closed(self, descriptor: int) -> None:
        """Note that a connection is gone."""
        connection = self._open.pop(descriptor, None)
        if connection is not None:
            connection.socket.detach()

    def delivered(self, descriptor: int) -> None:
        """Note a whole message from this connection."""
        connection = self._open.get(descriptor)
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.mark = connection.received()

    def shut_down_senders_of_too_much(self) -> int:
        """Ends connections with too many bytes since their last whole message; returns how many. Looks at some of them
        each time, in turn."""
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
        """Ends all but the ``most`` oldest connections."""
        open_ones = [connection for connection in self._open.values() if not connection.is_ending]
        for connection in open_ones[most:]:
            connection.shut_down()

    def close(self) -> None:
        """Lets go of all connections, which stay ZeroMQ's."""
        for descriptor in list(self._open):
            self.closed(descriptor)


def set_refusing(listener: int, is_refusing: bool) -> None:
    """Have the listening socket of this descriptor ignore who wants to connect, or not any more. Established
    connections go on. Without effect on a unix socket."""
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
    """A socket object for a descriptor of ZeroMQ's, to be detached and never closed. The family it claims to have does
    not matter to what is done with it."""
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=descriptor)
