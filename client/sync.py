"""``Client``: one connection to a server, used from ordinary (not asyncio) code, by one thread at a time."""

import time
from collections.abc import Iterator
from typing import Any, Self, Unpack

import zmq

from euryale.client import protocol
from euryale.client.answer import Answer, Completion
from euryale.client.connection import close_sockets, is_connected, open_sockets
from euryale.client.errors import ProtocolError, ServerLost, TimedOut
from euryale.client.params import GenerateParams
from euryale.client.protocol import Delta, HealthReply, ServerInfo
from euryale.client.session import (
    Exchange,
    Session,
    build_generate,
    check_connection,
    check_generation,
    check_seconds,
    lost_error,
)


class Client:
    """A connection to the server at ``address`` (``tcp://host:port`` or ``ipc://path``).

    ``timeout`` is how long to wait for each next message of a request, ``connect_timeout`` how long for a server to
    appear, both in seconds. Several requests may be in flight and be read in any order. All methods raise
    ServerLost if the server cannot be reached or goes away, TimedOut if it does not answer in time, and the typed
    error that it answers with.
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
        self._context: zmq.Context | None = zmq.Context()
        self._sockets: tuple[zmq.Socket, zmq.Socket] | None = None
        self._connected = False
        try:
            self._open()
        except ValueError:
            self.close()
            raise

    def hello(self, timeout: float = 5.0) -> ServerInfo:
        """Who is there: model, limits, defaults. Later messages are held to the server's size limit."""
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

        ``params`` are sampling parameters (max_tokens, temperature, stop, ...; docs/protocol.md). With ``n`` several
        answers are written at the same time: a delta's ``sample`` says whose it is, and ``result()`` has all of them in
        ``samples``. Raises InvalidRequest or TooLarge for what cannot be sent; what the server objects to is raised on
        reading.
        """
        message = build_generate(prompt, prompt_tokens, messages, params)
        return Generation(self, self._send(message), message)

    def cancel(self, generation: "Generation") -> bool:
        """Ends a generation; False if it had ended already. Reading it raises Cancelled after its last delta."""
        check_generation(generation, Generation)
        message = protocol.Cancel(target=generation.answer.exchange.request_id)
        return self._call(message, protocol.CancelReply, self.timeout).found

    def stats(self) -> dict[str, Any]:
        """Counters and gauges of the server."""
        return self._call(protocol.Stats(), protocol.StatsReply, self.timeout).values

    def health(self, timeout: float = 5.0) -> HealthReply:
        """Whether the server works: its status, the age of its engine's last sign of life, its uptime."""
        return self._call(protocol.Health(), HealthReply, timeout)

    def drain(self, timeout: float = 60.0) -> None:
        """Has the server finish what runs, take nothing new, and stop; returns when all is finished."""
        self._call(protocol.Drain(), protocol.Drained, timeout)

    def close(self) -> None:
        """Closes the connection; the server cancels what was in flight. May be called twice."""
        context, self._context = self._context, None
        if context is not None:
            self._close_sockets()
            self._session.lose(ServerLost("the client was closed"))
            context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_context", None) is not None:
            self.close()

    # ---- moving frames

    def _call(self, message: Any, reply_type: type, timeout: float) -> Any:
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
        for frames in self._session.overdue():
            self._send_soon(frames)
        self._pump(0)
        while not self._connected:
            if not self._pump(deadline - time.monotonic()):
                raise ServerLost(f"no server answers at {self.address} within {self.connect_timeout} seconds")
        exchange, frames = self._session.start(message)
        while not self._send_soon(frames):  # the queue is full
            if not self._sockets[0].poll(max(0, int(1000 * (deadline - time.monotonic()))), zmq.POLLOUT):
                del self._session.in_flight[exchange.request_id]
                raise TimedOut(f"the server took no message for {self.connect_timeout} seconds")
        return exchange

    def _send_soon(self, frames: list[bytes]) -> bool:
        try:
            self._sockets[0].send_multipart(frames, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def _wait(self, exchange: Exchange, timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        while (reply := exchange.next_reply()) is None:
            if not self._pump(deadline - time.monotonic()):
                raise TimedOut(f"nothing arrived for this request within {timeout} seconds")
        return reply

    def _pump(self, timeout: float) -> bool:
        """Waits up to ``timeout`` seconds, then hands on all that arrived. False if nothing came in that time."""
        self._open()
        dealer, monitor = self._sockets
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        if not poller.poll(max(0, round(1000 * timeout))):
            return False
        # The monitor first: what arrived before the connection broke is then in the DEALER for certain.
        events = [is_connected(frames) for frames in _receive_all(monitor)]
        for frames in _receive_all(dealer):
            self._session.receive(frames)
        if False in events and (self._connected or True in events):
            self._close_sockets()  # a fresh socket later: this one would send old requests to a restarted server
            self._session.lose(lost_error(self.address))
        elif events:
            self._connected = events[-1]
        return True

    def _open(self) -> None:
        if self._context is None:
            raise ServerLost("the client was closed")
        if self._sockets is None:
            self._sockets = open_sockets(self._context, self.address)

    def _close_sockets(self) -> None:
        sockets, self._sockets, self._connected = self._sockets, None, False
        if sockets is not None:
            close_sockets(*sockets)

    def _abandon(self, exchange: Exchange) -> None:
        frames = self._session.abandon(exchange)
        if frames and self._sockets is not None:
            self._send_soon(frames)


class Generation:
    """An answer being written. Iterate over it for its deltas, or ask for ``result()``.

    Leaving a loop over it early, closing it, or dropping it cancels the request.
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
        """Waits for the end; the whole answer, deltas read before included."""
        for _ in self:
            pass
        return self.answer.completion()

    def text(self) -> str:
        """Waits for the end; the whole text."""
        return self.result().text

    def partial(self) -> Completion:
        """What was read so far, without waiting."""
        return self.answer.completion()

    def close(self) -> None:
        """Cancels the request if it still runs, without waiting for an answer."""
        if not self.answer.closed:
            self.answer.closed = True
            self._client._abandon(self.answer.exchange)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _receive_all(socket: zmq.Socket) -> Iterator[list[bytes]]:
    while True:
        try:
            yield socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return
