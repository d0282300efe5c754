"""The client's side of the protocol without input or output: makes messages, and assigns replies to requests.

``Client`` and ``AsyncClient`` share this and move the frames. Nothing here knows a socket or a clock.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from euryale.client import protocol, wire
from euryale.client.errors import (
    Cancelled,
    EuryaleError,
    InvalidRequest,
    ServerLost,
    TimedOut,
    TooLarge,
    error_from_code,
)
from euryale.client.params import PROMPT_RULES, check_params
from euryale.client.rules import Rule, is_text, number, whole

logger = logging.getLogger("euryale.client")


class Exchange:
    """One request in flight, with its unread replies. ``on_change`` is called when a reply or an error arrives."""

    def __init__(self, request_id: bytes) -> None:
        self.request_id = request_id
        self.replies: deque[Any] = deque()
        self.error: EuryaleError | None = None
        self.on_change: Callable[[], None] = lambda: None

    def next_reply(self) -> Any | None:
        """Returns the oldest unread reply, None if there is none yet. Raises the error that ended the request."""
        if self.replies:
            return self.replies.popleft()
        if self.error is not None:
            raise self.error
        return None

    def fail(self, error: EuryaleError) -> None:
        """Ends the request with an error; replies that arrived before can still be read."""
        self.error = error
        self.on_change()


class Session:
    """All requests of one connection. Only ``abandon`` may be called from other threads."""

    def __init__(self, max_message_bytes: int = protocol.DEFAULT_MAX_MESSAGE_BYTES) -> None:
        whole(1, 2**63 - 1, "bytes").check("max_message_bytes", max_message_bytes)
        self.max_message_bytes = max_message_bytes
        self.in_flight: dict[bytes, Exchange] = {}
        self._num_requests = 0
        self._abandoned: deque[Exchange] = deque()
        self._thread = threading.get_ident()

    def start(self, message: Any) -> tuple[Exchange, list[bytes]]:
        """Opens an exchange for a request; returns it with the frames to send.

        Raises InvalidRequest or TooLarge if the message cannot be sent; then there is no exchange.
        """
        try:
            body = wire.encode(message)
        except ValueError as error:
            raise InvalidRequest(f"{message.type}: {error}") from None
        if len(body) > self.max_message_bytes:
            raise TooLarge(
                f"the {message.type} message has {len(body)} bytes and the server accepts {self.max_message_bytes}: "
                "shorten it"
            )
        self._num_requests += 1
        exchange = Exchange(self._num_requests.to_bytes(8, "big"))
        self.in_flight[exchange.request_id] = exchange
        return exchange, [exchange.request_id, body]

    def receive(self, frames: Sequence[bytes]) -> None:
        """Passes a reply to its exchange. Replies to abandoned requests are dropped."""
        if len(frames) != 2:
            logger.warning("dropped a message of %d frames", len(frames))
            return
        request_id, body = frames
        exchange = self.in_flight.get(request_id)
        if exchange is None and request_id:
            return
        try:
            reply = wire.decode(body, protocol.REPLIES, strict=False)
        except wire.WireError as error:
            reply = protocol.Error(code="malformed", message=f"the server's reply cannot be read: {error}")
        if exchange is None:
            self._receive_for_connection(reply)
        elif isinstance(reply, protocol.STREAMED):
            exchange.replies.append(reply)
            exchange.on_change()
        else:
            del self.in_flight[request_id]
            if isinstance(reply, protocol.Error):
                exchange.fail(error_from_code(reply.code, reply.message, reply.retry_after))
            else:
                exchange.replies.append(reply)
                exchange.on_change()

    def _receive_for_connection(self, reply: Any) -> None:
        """Handles a reply without a request id, which is an Alive or an Error."""
        if not isinstance(reply, protocol.Error):
            return
        error = error_from_code(reply.code, reply.message, reply.retry_after)
        if reply.request_id is None:
            self.lose(error)
        elif exchange := self.in_flight.pop(reply.request_id, None):
            exchange.fail(error)

    def lose(self, error: EuryaleError) -> None:
        """Ends every exchange with this error, since the connection is lost."""
        lost, self.in_flight = self.in_flight, {}
        for exchange in lost.values():
            exchange.fail(error)

    def abandon(self, exchange: Exchange) -> list[bytes] | None:
        """Abandons an exchange; returns the frames that cancel it, None if nothing is to be sent now.

        The garbage collector may call this from any thread. In other threads than the owner's it only notes the
        exchange for ``cancel_abandoned``.
        """
        if threading.get_ident() != self._thread:
            self._abandoned.append(exchange)
            return None
        if self.in_flight.pop(exchange.request_id, None) is None:
            return None
        exchange.fail(Cancelled("the request was abandoned by its reader"))
        reply, frames = self.start(protocol.Cancel(target=exchange.request_id))
        del self.in_flight[reply.request_id]  # the reply is not awaited
        return frames

    def cancel_abandoned(self) -> Iterable[list[bytes]]:
        """Yields the frames that cancel exchanges abandoned in other threads. The calling thread becomes the owner."""
        self._thread = threading.get_ident()
        while self._abandoned:
            if frames := self.abandon(self._abandoned.popleft()):
                yield frames


_SECONDS = number(0, 1e9, "seconds")
_ADDRESS = Rule("tcp://host:port or ipc://path", lambda v: is_text(v) and "://" in v and "\0" not in v)


def check_connection(address: object, **seconds: object) -> None:
    """Raises ValueError, naming it, for an address or a timeout that cannot be used."""
    _ADDRESS.check("address", address)
    check_seconds(**seconds)


def check_seconds(**seconds: object) -> None:
    """Raises ValueError, naming it, for a timeout that is not a number of seconds."""
    for name, value in seconds.items():
        _SECONDS.check(name, value)


def check_generation(generation: object, kind: type) -> None:
    """Raises ValueError unless this is what ``generate`` of the same client class returned."""
    Rule("what generate() returned", lambda v: isinstance(v, kind)).check("generation", generation)


def build_generate(
    prompt: str | None, prompt_tokens: Any, messages: Any, params: Mapping[str, Any]
) -> protocol.Generate:
    """Returns the generate message of a call; ``params`` are those of GenerateParams.

    A request without a seed gets a random one, so that it can be repeated. Raises InvalidRequest, which names the given
    and the right value, for anything that no server accepts; the server checks what depends on the model.
    """
    given = [x is not None for x in (prompt, prompt_tokens, messages)]
    if sum(given) != 1:
        raise InvalidRequest(f"give exactly one of prompt, prompt_tokens and messages, not {sum(given)} of them")
    params = {name: _plain(value) for name, value in params.items() if value is not None}
    params.setdefault("seed", int.from_bytes(os.urandom(8), "big"))
    prompts = {"prompt": prompt, "prompt_tokens": _plain(prompt_tokens), "messages": _plain(messages)}
    try:
        for name, value in prompts.items():
            if value is not None:
                PROMPT_RULES[name].check(name, value)
        check_params(params)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    if "logit_bias" in params:
        params["logit_bias"] = {str(token): value for token, value in params["logit_bias"].items()}  # keys are strings
    tokens = None if prompt_tokens is None else wire.pack_tokens(prompts["prompt_tokens"])
    chat = None if messages is None else tuple(dict(item) for item in prompts["messages"])
    return protocol.Generate(prompt=prompt, prompt_tokens=tokens, messages=chat, params=params)


def _plain(value: Any) -> Any:
    """Numbers and sequences of other libraries as Python's own; what is neither stays as it is."""
    if isinstance(value, str | bytes | Mapping):
        return value
    if hasattr(value, "tolist"):  # arrays, and their numbers
        return value.tolist()
    return list(value) if isinstance(value, Iterable) else value


def lost_error(address: str) -> ServerLost:
    """Returns the error for a broken connection."""
    return ServerLost(f"the connection to {address} broke; requests in flight are lost: send them again")


def closed_error() -> ServerLost:
    """Returns the error for the use of a closed client."""
    return ServerLost("this client is closed: create a new one")


def unreachable_error(address: str, seconds: float) -> ServerLost:
    """Returns the error for a connection that was not made within connect_timeout ``seconds``."""
    return ServerLost(
        f"no server answered at {address} within {seconds} seconds: check the address, start the server, or raise "
        "connect_timeout"
    )


def unaccepted_error(seconds: float) -> TimedOut:
    """Returns the error for a message that could not be sent within connect_timeout ``seconds``."""
    return TimedOut(
        f"the server accepted no message for {seconds} seconds: read pending answers, or raise connect_timeout"
    )


def unanswered_error(seconds: float) -> TimedOut:
    """Returns the error for a request of which no message arrived within timeout ``seconds``."""
    return TimedOut(
        f"nothing arrived for this request within {seconds} seconds: raise timeout, or ask health() whether the "
        "server works"
    )
