"""``AsyncClient``: one connection to a server, for asyncio code and one event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Self, TypeVar, Unpack

import zmq
import zmq.asyncio

from euryale.client import protocol
from euryale.client.answer import Answer, Completion
from euryale.client.connection import close_sockets, is_connected, open_sockets
from euryale.client.errors import EuryaleError, ProtocolError, ServerLost
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


class AsyncClient:
    """A connection to the server at ``address``; see ``Client`` for arguments and errors."""

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
        self._context: zmq.asyncio.Context | None = zmq.asyncio.Context()
        self._sockets: tuple[zmq.asyncio.Socket, zmq.asyncio.Socket] | None = None
        self._connected = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._senders: set[asyncio.Task[None]] = set()

    async def hello(self, timeout: float = 5.0) -> ServerInfo:
        """Returns the server's model, limits and defaults. Later messages are checked against its size limit.

        ``timeout`` in seconds."""
        info = await self._call(protocol.Hello(), ServerInfo, timeout)
        self._session.max_message_bytes = info.max_message_bytes
        return info

    def generate(
        self,
        prompt: str | None = None,
        *,
        prompt_tokens: Any = None,
        messages: Any = None,
        **params: Unpack[GenerateParams],
    ) -> "AsyncGeneration":
        """Starts a generation; see ``Client.generate``. Returns at once, and sends the request in the background."""
        message = build_generate(prompt, prompt_tokens, messages, params)
        exchange, frames = self._session.start(message)
        task = asyncio.get_running_loop().create_task(self._send_or_fail(exchange, frames))
        self._senders.add(task)
        task.add_done_callback(self._senders.discard)
        return AsyncGeneration(self, exchange, message)

    async def cancel(self, generation: "AsyncGeneration") -> bool:
        """Cancels a generation; returns False if it had ended. Reading it raises Cancelled after its last delta."""
        check_generation(generation, AsyncGeneration)
        message = protocol.Cancel(target=generation.answer.exchange.request_id)
        return (await self._call(message, protocol.CancelReply, self.timeout)).found

    async def stats(self) -> dict[str, Any]:
        """Returns the counters and gauges of the server."""
        return (await self._call(protocol.Stats(), protocol.StatsReply, self.timeout)).values

    async def health(self, timeout: float = 5.0) -> HealthReply:
        """Returns the server's status, the seconds since the engine last responded, and the uptime in seconds.

        ``timeout`` in seconds."""
        return await self._call(protocol.Health(), HealthReply, timeout)

    async def drain(self, timeout: float = 60.0) -> None:
        """Lets the server finish its requests, refuse new ones and stop; returns when all requests have ended.

        ``timeout`` in seconds; TimedOut if the server's --drain-timeout is longer."""
        await self._call(protocol.Drain(), protocol.Drained, timeout)

    async def close(self) -> None:
        """Closes the connection; the server cancels requests in flight. May be called twice."""
        context, self._context = self._context, None
        if context is None:
            return
        tasks = [*self._senders, *([self._reader] if self._reader else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._close_sockets()
        self._session.lose(closed_error())
        context.term()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    # ---- moving frames

    async def _call(self, message: Any, reply_type: type[T], timeout: float) -> T:
        """Sends a message and returns its reply. Raises ProtocolError for a reply of another type."""
        check_seconds(timeout=timeout)
        exchange, frames = self._session.start(message)
        try:
            await self._send(frames)
            reply = await self._wait(exchange, timeout)
        finally:
            self._session.in_flight.pop(exchange.request_id, None)
        if not isinstance(reply, reply_type):
            raise ProtocolError(f"the server answered {message.type} with {reply.type}")
        return reply

    async def _send_or_fail(self, exchange: Exchange, frames: list[bytes]) -> None:
        try:
            await self._send(frames, exchange)
        except EuryaleError as error:
            self._session.in_flight.pop(exchange.request_id, None)
            exchange.fail(error)

    async def _send(self, frames: list[bytes], exchange: Exchange | None = None) -> None:
        if self._context is None:
            raise closed_error()
        if self._reader is None:
            self._reader = asyncio.get_running_loop().create_task(self._read())
        try:
            async with asyncio.timeout(self.connect_timeout):
                await self._connected.wait()
        except TimeoutError:
            raise unreachable_error(self.address, self.connect_timeout) from None
        if exchange is not None and exchange.error is not None:
            return  # abandoned while waiting for the connection
        for cancel_frames in self._session.cancel_abandoned():
            self._send_soon(cancel_frames)
        sent = self._send_now(frames)
        await asyncio.wait([sent], timeout=self.connect_timeout)
        if not sent.done():
            sent.cancel()
            raise unaccepted_error(self.connect_timeout)
        if sent.cancelled() or sent.exception():  # the socket was closed meanwhile
            raise lost_error(self.address)

    def _send_now(self, frames: list[bytes]) -> asyncio.Future[Any]:
        """Begins to send a message. Raises ServerLost if the connection was closed."""
        if self._sockets is None:
            raise lost_error(self.address)
        sent = self._sockets[0].send_multipart(frames)
        assert isinstance(sent, asyncio.Future)
        return sent

    def _send_soon(self, frames: list[bytes]) -> None:
        """Sends a message in the background and ignores errors, since the server may be gone."""
        self._send_now(frames).add_done_callback(lambda sent: sent.cancelled() or sent.exception())

    async def _wait(self, exchange: Exchange, timeout: float) -> Any:
        changed = asyncio.Event()
        exchange.on_change = changed.set
        try:
            async with asyncio.timeout(timeout):
                while (reply := exchange.next_reply()) is None:
                    changed.clear()
                    await changed.wait()
        except TimeoutError as error:
            if isinstance(error, EuryaleError):
                raise
            raise unanswered_error(timeout) from None
        return reply

    async def _read(self) -> None:
        """Processes all that arrives, until the client is closed."""
        try:
            while self._context is not None:
                dealer, monitor = open_sockets(self._context, self.address)
                assert isinstance(dealer, zmq.asyncio.Socket)
                assert isinstance(monitor, zmq.asyncio.Socket)
                self._sockets = dealer, monitor
                await self._read_connection(dealer, monitor)
                self._close_sockets()  # a new socket follows: this one would send old requests to a restarted server
                self._session.lose(lost_error(self.address))
        except ValueError as error:
            self._session.lose(ServerLost(str(error)))

    async def _read_connection(self, dealer: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket) -> None:
        poller = zmq.asyncio.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        while True:
            await poller.poll()
            # The monitor is read first: whatever arrived before the connection broke is then in the DEALER.
            events = [is_connected(frames) for frames in await _receive_all(monitor)]
            for frames in await _receive_all(dealer):
                self._session.receive(frames)
            if False in events and (self._connected.is_set() or True in events):
                return
            if True in events:
                self._connected.set()

    def _close_sockets(self) -> None:
        sockets, self._sockets = self._sockets, None
        self._connected.clear()
        if sockets is not None:
            close_sockets(*sockets)

    def _abandon(self, exchange: Exchange) -> None:
        frames = self._session.abandon(exchange)
        if frames and self._connected.is_set():
            with contextlib.suppress(RuntimeError):  # dropped after its event loop has ended
                self._send_soon(frames)


class AsyncGeneration:
    """An answer in progress. Iterate over it with ``async for``, or await ``result()``.

    Leaving the loop early, closing the generation, or dropping the last reference to it cancels the request.
    """

    def __init__(self, client: AsyncClient, exchange: Exchange, message: protocol.Generate) -> None:
        self.answer = Answer(exchange, message)
        self._client = client

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            while (delta := await self._next()) is not None:
                yield delta
        finally:
            self.close()

    async def _next(self) -> Delta | None:
        while self.answer.done is None:
            delta = self.answer.take(await self._client._wait(self.answer.exchange, self._client.timeout))
            if delta is not None:
                return delta
        return None

    async def result(self) -> Completion:
        """Waits for the end and returns the whole answer, with all deltas read before."""
        try:
            while await self._next() is not None:
                pass
        finally:
            self.close()
        return self.answer.completion()

    async def text(self) -> str:
        """Waits for the end and returns the whole text."""
        return (await self.result()).text

    def partial(self) -> Completion:
        """Returns what was read so far, without waiting."""
        return self.answer.completion()

    def close(self) -> None:
        """Cancels the request if it still runs, without waiting for the server."""
        if not self.answer.closed:
            self.answer.closed = True
            self._client._abandon(self.answer.exchange)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


async def _receive_all(socket: zmq.asyncio.Socket) -> list[list[bytes]]:
    messages = []
    while True:
        try:
            messages.append(await socket.recv_multipart(zmq.DONTWAIT))
        except zmq.Again:
            return messages
