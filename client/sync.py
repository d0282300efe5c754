"""``Client``: one connection to a server, for synchronous code and one thread at a time."""

import time
from collections.abc import Iterator
from typing import Any, Self, TypeVar, Unpack

import zmq

from euryale.client import protocol
from euryale.client.answer import Answer, Completion
from euryale.client.connection import close_sockets, is_connected, open_sockets
from euryale.client.errors import ProtocolError
from euryale.client.params import GenerateParams
from euryale.client.protocol import Delta, HealthReply, ServerInfo
from euryale.client.session import (
    Exchange,
    Session,
    build_generate,
    check_connection,
    check_generation,
    check_seconds,
    closed_error,
    lost_error,
    unaccepted_error,
    unanswered_error,
    unreachable_error,
)

T = TypeVar("T")


class Client:
    """A connection to the server at ``address`` (``tcp://host:port`` or ``ipc://path``).

    ``timeout``: how long to wait for the next message of a request, in seconds. ``connect_timeout``: how long to wait
    for a connection, in seconds. Several requests may be in flight and be read in any order. All methods raise
    ServerLost if the server cannot be reached or disconnects, TimedOut if it does not answer in time, and the typed
    error of its reply. ``max_message_bytes``: limit of a request until ``hello`` reads the server's own.

    The constructor raises ValueError for an invalid address, timeout or size.
    """

    def __init__(
        self,
        address: str = protocol.DEFAULT_ADDRESS,
        *,
        timeout: float = 60.0,
        connect_timeout: float = 5.0,
        max_message_bytes: int = protocol.DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        check_connection(address, timeout=timeout, connect_timeout=connect_timeout)
        self.address = address
        self.timeout = timeout
        self.connect_timeout = connect_timeout
        self._session = Session(max_message_bytes)
        self._context: zmq.Context[Any] | None = zmq.Context()
        self._sockets: tuple[zmq.Socket[bytes], zmq.Socket[bytes]] | None = None
        self._connected = False
        try:
            self._open()
        except ValueError:
            self.close()
            raise

    def hello(self, timeout: float = 5.0) -> ServerInfo:
        """Returns the server's model, limits and defaults. Later messages are checked against its size limit.

        ``timeout`` in seconds."""
        info = self._call(protocol.Hello(), ServerInfo, timeout)
        self._session.max_message_bytes = info.max_message_bytes
        return info

    def generate(
        self,
        prompt: str | None = None,
        *,
        prompt_tokens: Any = None,
        messages: Any = None,
        **params: Unpack[GenerateParams],
    ) -> "Generation":
        """Starts a generation from a text, from token ids, or from chat messages ({role, content} maps).

        ``params`` are sampling parameters (see docs/protocol.md). With ``n`` > 1 several answers are generated at once:
        ``Delta.sample_index`` says to which one a delta belongs, and ``result().samples`` has all of them. Raises
        InvalidRequest or TooLarge for a request that cannot be sent; errors of the server are raised on reading.
        """
        message = build_generate(prompt, prompt_tokens, messages, params)
        return Generation(self, self._send(message), message)

    def cancel(self, generation: "Generation") -> bool:
        """Cancels a generation; returns False if it had ended. Reading it raises Cancelled after its last delta."""
        check_generation(generation, Generation)
        message = protocol.Cancel(target=generation.answer.exchange.request_id)
        return self._call(message, protocol.CancelReply, self.timeout).found

    def stats(self) -> dict[str, Any]:
        """Returns the counters and gauges of the server."""
        return self._call(protocol.Stats(), protocol.StatsReply, self.timeout).values

    def health(self, timeout: float = 5.0) -> HealthReply:
        """Returns the server's status, the seconds since the engine last responded, and the uptime in seconds.

        ``timeout`` in seconds."""
        return self._call(protocol.Health(), HealthReply, timeout)

    def drain(self, timeout: float = 60.0) -> None:
        """Lets the server finish its requests, refuse new ones and stop; returns when all requests have ended.

        ``timeout`` in seconds; TimedOut if the server's --drain-timeout is longer."""
        self._call(protocol.Drain(), protocol.Drained, timeout)

    def close(self) -> None:
        """Closes the connection; the server cancels requests in flight. May be called twice."""
        context, self._context = self._context, None
        if context is not None:
            self._close_sockets()
            self._session.lose(closed_error())
            context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_context", None) is not None:
            self.close()

    # ---- moving frames

    def _call(self, message: Any, reply_type: type[T], timeout: float) -> T:
        """Sends a message and returns its reply. Raises ProtocolError for a reply of another type."""
        check_seconds(timeout=timeout)
        exchange = self._send(message)
        try:
            reply = self._wait(exchange, timeout)
        finally:
            self._session.in_flight.pop(exchange.request_id, None)
        if not isinstance(reply, reply_type):
            raise ProtocolError(f"the server answered {message.type} with {reply.type}")
        return reply

    def _send(self, message: Any) -> Exchange:
        deadline = time.monotonic() + self.connect_timeout
        self._open()
        for frames in self._session.cancel_abandoned():
            self._send_soon(frames)
        self._pump(0)
        while not self._connected:
            if not self._pump(deadline - time.monotonic()):
                raise unreachable_error(self.address, self.connect_timeout)
        exchange, frames = self._session.start(message)
        while not self._send_soon(frames):  # the queue is full
            if not self._open()[0].poll(max(0, int(1000 * (deadline - time.monotonic()))), zmq.POLLOUT):
                del self._session.in_flight[exchange.request_id]
                raise unaccepted_error(self.connect_timeout)
        return exchange

    def _send_soon(self, frames: list[bytes]) -> bool:
        """Sends a message without waiting; returns False if the queue is full."""
        dealer, _ = self._open()
        try:
            dealer.send_multipart(frames, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def _wait(self, exchange: Exchange, timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        while (reply := exchange.next_reply()) is None:
            if not self._pump(deadline - time.monotonic()):
                raise unanswered_error(timeout)
        return reply

    def _pump(self, timeout: float) -> bool:
        """Waits up to ``timeout`` seconds and processes all that arrived; returns False if nothing arrived."""
        dealer, monitor = self._open()
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        if not poller.poll(max(0, round(1000 * timeout))):
            return False
        # The monitor is read first: whatever arrived before the connection broke is then in the DEALER.
        events = [is_connected(frames) for frames in _receive_all(monitor)]
        for frames in _receive_all(dealer):
            self._session.receive(frames)
        if False in events and (self._connected or True in events):
            self._close_sockets()  # a new socket follows: this one would send old requests to a restarted server
            self._session.lose(lost_error(self.address))
        elif events:
            self._connected = events[-1]
        return True

    def _open(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """Returns the DEALER and its monitor, opened if necessary. Raises ServerLost after ``close``."""
        if self._context is None:
            raise closed_error()
        if self._sockets is None:
            self._sockets = open_sockets(self._context, self.address)
        return self._sockets

    def _close_sockets(self) -> None:
        sockets, self._sockets, self._connected = self._sockets, None, False
        if sockets is not None:
            close_sockets(*sockets)

    def _abandon(self, exchange: Exchange) -> None:
        frames = self._session.abandon(exchange)
        if frames and self._sockets is not None:
            self._send_soon(frames)


class Generation:
    """An answer in progress. Iterate over it for its deltas, or ask for ``result()``.

    Leaving the loop early, closing the generation, or dropping the last reference to it cancels the request.
    """

    def __init__(self, client: Client, exchange: Exchange, message: protocol.Generate) -> None:
        self.answer = Answer(exchange, message)
        self._client = client

    def __iter__(self) -> Iterator[Delta]:
        try:
            while (delta := self._next()) is not None:
                yield delta
        finally:
            self.close()

    def _next(self) -> Delta | None:
        while self.answer.done is None:
            delta = self.answer.take(self._client._wait(self.answer.exchange, self._client.timeout))
            if delta is not None:
                return delta
        return None

    def result(self) -> Completion:
        """Waits for the end and returns the whole answer, with all deltas read before."""
        for _ in self:
            pass
        return self.answer.completion()

    def text(self) -> str:
        """Waits for the end and returns the whole text."""
        return self.result().text

    def partial(self) -> Completion:
        """Returns what was read so far, without waiting."""
        return self.answer.completion()

    def close(self) -> None:
        """Cancels the request if it still runs, without waiting for the server."""
        if not self.answer.closed:
            self.answer.closed = True
            self._client._abandon(self.answer.exchange)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _receive_all(socket: zmq.Socket[bytes]) -> Iterator[list[bytes]]:
    while True:
        try:
            yield socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return
