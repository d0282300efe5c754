"""Intake of requests: turns generate messages into requests in flight.

Long texts are tokenized in other threads, so that other answers continue. Requests of one connection are processed in
the order sent, and connections take turns.
"""

import contextlib
import logging
import socket
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from euryale.client import protocol, wire
from euryale.frontend.client_socket import ClientPort
from euryale.frontend.config import FrontEndConfig
from euryale.frontend.in_flight import InFlight
from euryale.frontend.validation import RequestError, RequestLimits, check_prompt, read_params, read_prompt

logger = logging.getLogger("euryale.frontend")

NUM_THREADS = 2  # that tokenize
MAX_INLINE_CHARACTERS = 4096  # of a text that the loop tokenizes itself, in a few milliseconds
MAX_PENDING_BYTES = 128 << 20  # of texts that wait or are being tokenized


@dataclass(eq=False, kw_only=True)
class PendingRequest:
    """A request whose prompt is not tokenized yet.

    A thread sets ``prompt`` int32 [length] or ``error``. ``num_bytes``: memory of its texts. ``dropped``: no client
    waits for it, but a thread may still be tokenizing it.
    """

    client: bytes
    request_id: bytes
    message: protocol.Generate
    num_samples: int
    num_bytes: int
    prompt: np.ndarray | None = None
    error: Exception | None = None
    dropped: bool = False


def error_reply(error: Exception) -> protocol.Error:
    """Return the reply for a request that raised ``error``. Errors of the server itself are also logged."""
    if isinstance(error, RequestError):
        return error.reply
    if isinstance(error, wire.WireError):
        return protocol.Error(code=error.code, message=str(error))
    logger.error("a request could not be handled", exc_info=error)
    return protocol.Error(code="internal", message="the server failed on this request; its log says why")


class Intake:
    """Checks and tokenizes requests and adds them to ``requests``.

    ``len()`` counts the samples of pending requests. ``wakeup`` is readable when ``advance`` has work. Set ``limits``
    and ``fingerprint`` before the first request.
    """

    def __init__(self, port: ClientPort, requests: InFlight, tokenizer: Any, config: FrontEndConfig) -> None:
        self.limits: RequestLimits | None = None
        self.fingerprint = ""
        self._port = port
        self._requests = requests
        self._tokenizer = tokenizer
        self._config = config
        self._waiting: dict[bytes, deque[PendingRequest]] = {}  # by client, in the order of their turns
        self._running: dict[bytes, PendingRequest] = {}  # by client
        self._finished: deque[PendingRequest] = deque()  # filled by the threads
        self._pool = ThreadPoolExecutor(NUM_THREADS, "tokenizer")
        self.wakeup, self._waker = socket.socketpair()
        self.wakeup.setblocking(False)
        self._waker.setblocking(False)
        # The first call changes the tokenizer's settings, which is not safe while another thread uses it.
        tokenizer.encode("a", add_special_tokens=True)

    def __len__(self) -> int:
        return sum(pending.num_samples for pending in self._pending())

    @property
    def clients(self) -> set[bytes]:
        """The clients with pending requests."""
        return {pending.client for pending in self._pending() if not pending.dropped}

    def find(self, client: bytes, request_id: bytes) -> PendingRequest | None:
        """Return the pending request of this client and id; None if there is none."""
        found = (p for p in self._pending() if (p.client, p.request_id) == (client, request_id) and not p.dropped)
        return next(found, None)

    def take(self, client: bytes, request_id: bytes, message: protocol.Generate) -> None:
        """Start processing a request. Raises RequestError for what can be refused without tokenizing its prompt."""
        limits = self._known_limits()
        self._check_room(1)  # before any work is done for it
        num_characters = check_prompt(message)
        num_samples = read_params(message.params, 1, limits).n
        if num_samples > self._config.max_queue:
            most = self._config.max_queue
            raise RequestError(
                "invalid_request",
                f"n {num_samples} is more than the {most} requests this server allows: ask for {most} or less",
            )
        self._check_room(num_samples)
        is_first = client not in self._waiting and client not in self._running
        if is_first and num_characters <= MAX_INLINE_CHARACTERS:
            self._admit(client, request_id, message, read_prompt(message, self._tokenizer, limits))
            return
        texts: list[str | bytes] = [message.prompt or message.prompt_tokens or ""]
        texts += [text for item in message.messages or () for text in item.values()]
        num_bytes = sum(map(sys.getsizeof, texts))
        if sum(pending.num_bytes for pending in self._pending()) + num_bytes > MAX_PENDING_BYTES:
            text = f"the server has more than {MAX_PENDING_BYTES >> 20} MiB of prompts to tokenize"
            raise RequestError("overloaded", text, retry_after=self._requests.retry_after())
        pending = PendingRequest(
            client=client, request_id=request_id, message=message, num_samples=num_samples, num_bytes=num_bytes
        )
        self._waiting.setdefault(client, deque()).append(pending)
        self._start()

    def advance(self) -> None:
        """Move requests whose prompts are tokenized to those in flight, or answer them with an error."""
        with contextlib.suppress(BlockingIOError):
            self.wakeup.recv(4096)
        while self._finished:
            pending = self._finished.popleft()
            del self._running[pending.client]
            if not pending.dropped:
                self._finish(pending)
        self._start()

    def cancel(self, pending: PendingRequest) -> None:
        """Cancel a request."""
        cancelled = protocol.SampleEnd(finish_reason="cancelled", output_tokens=0, decode_steps=0)
        usage = protocol.Usage(prompt_tokens=0, output_tokens=0, decode_steps=0)
        samples = (cancelled,) * pending.num_samples if pending.num_samples > 1 else None
        done = protocol.Done(finish_reason="cancelled", text="", usage=usage, samples=samples)
        self._port.send(pending.client, pending.request_id, done)
        self._drop(pending, "cancelled")

    def cancel_all(self) -> None:
        """Cancel all requests."""
        for pending in [p for p in self._pending() if not p.dropped]:
            self.cancel(pending)

    def forget(self, client: bytes) -> None:
        """Cancel the requests of a client that is gone."""
        for pending in [p for p in self._pending() if p.client == client and not p.dropped]:
            self._drop(pending, "cancelled")

    def lose(self, error: protocol.Error) -> None:
        """Finish all requests with ``error``."""
        for pending in [p for p in self._pending() if not p.dropped]:
            self._port.send(pending.client, pending.request_id, error)
            self._drop(pending, "failed")

    def close(self) -> None:
        """Stop the threads once they finish their current text. May be called twice."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.wakeup.close()
        self._waker.close()

    def _pending(self) -> list[PendingRequest]:
        return [*self._running.values(), *(pending for queue in self._waiting.values() for pending in queue)]

    def _known_limits(self) -> RequestLimits:
        assert self.limits is not None, "limits are set before the first request"
        return self.limits

    def _check_room(self, num_samples: int) -> None:
        """Raise RequestError if ``num_samples`` more samples exceed max_queue."""
        num_held = len(self._requests) + len(self)
        if num_held + num_samples > self._config.max_queue:
            text = f"the server has {num_held} requests in flight, the maximum"
            if num_held < self._config.max_queue:
                text = f"the server has {num_held} requests in flight and no room for {num_samples} more samples"
            raise RequestError("overloaded", text, retry_after=self._requests.retry_after())

    def _start(self) -> None:
        """Give idle threads work: one request of a client at a time, the clients in turn."""
        for client in [client for client in self._waiting if client not in self._running]:
            if len(self._running) == NUM_THREADS:
                return
            queue = self._waiting.pop(client)
            self._running[client] = queue.popleft()
            if queue:
                self._waiting[client] = queue  # behind the others
            self._pool.submit(self._read, self._running[client])

    def _read(self, pending: PendingRequest) -> None:
        """Tokenize a request's prompt. Runs in a thread."""
        try:
            pending.prompt = read_prompt(pending.message, self._tokenizer, self._known_limits())
        except Exception as error:
            pending.error = error
        self._finished.append(pending)
        with contextlib.suppress(OSError):  # full, so readable already, or closed
            self._waker.send(b"\0")

    def _finish(self, pending: PendingRequest) -> None:
        client, request_id = pending.client, pending.request_id
        try:
            if pending.prompt is None:
                raise pending.error or RuntimeError("a thread set neither prompt nor error")
            self._admit(client, request_id, pending.message, pending.prompt)
        except Exception as error:
            self._requests.counts["requests_rejected"] += 1
            self._port.send(client, request_id, error_reply(error))

    def _admit(self, client: bytes, request_id: bytes, message: protocol.Generate, prompt: np.ndarray) -> None:
        params = read_params(message.params, len(prompt), self._known_limits())
        packed: Any = prompt.tobytes()  # the field's packing accepts packed tokens, which spares a tuple of integers
        queued = protocol.Queued(prompt_tokens=packed, seed=params.seed, fingerprint=self.fingerprint)
        self._port.send(client, request_id, queued)
        self._requests.add(client, request_id, prompt, params)

    def _drop(self, pending: PendingRequest, outcome: str) -> None:
        """Forget a request. One that a thread is tokenizing still counts until the thread is done."""
        self._requests.counts[f"requests_{outcome}"] += 1
        pending.dropped = True
        queue = self._waiting.get(pending.client)
        if queue and pending in queue:
            queue.remove(pending)
            if not queue:
                del self._waiting[pending.client]
