"""Requests on their way in: what happens between a generate message and its place among the requests in flight.

A long text is tokenized in another thread, so that the answers of others go on meanwhile. Requests of one connection
are taken in the order sent; those of different connections take turns.
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

NUM_THREADS = 2
MAX_INLINE_CHARACTERS = 4096  # of a text that is tokenized at once: a few milliseconds
MAX_PENDING_BYTES = 128 << 20  # of texts that wait or are being tokenized


@dataclass(eq=False, kw_only=True)
class PendingRequest:
    """A request whose prompt is not known yet. ``prompt`` int32 [length] or ``error`` is set by the thread that reads
    it. ``dropped``: nobody waits for it any more; a thread may still be at work on it."""

    client: bytes
    request_id: bytes
    message: protocol.Generate
    num_samples: int
    num_bytes: int
    prompt: np.ndarray | None = None
    error: Exception | None = None
    dropped: bool = False


def error_reply(error: Exception) -> protocol.Error:
    """What the sender of a request is told of an error; what is the server's fault goes to the log."""
    if isinstance(error, RequestError):
        return error.reply
    if isinstance(error, wire.WireError):
        return protocol.Error(code=error.code, message=str(error))
    logger.error("a request could not be handled", exc_info=error)
    return protocol.Error(code="internal", message="the server failed on this request; its log says why")


class Intake:
    """Takes generate messages, and puts what can be done among ``requests``. ``len()`` counts the samples of requests
    that are not there yet. ``wakeup`` is readable when ``advance`` has something to do. ``limits`` and ``fingerprint``
    have to be set before the first request."""

    def __init__(self, port: ClientPort, requests: InFlight, tokenizer: Any, config: FrontEndConfig) -> None:
        self.limits: RequestLimits | None = None
        self.fingerprint = ""
        self._port = port
        self._requests = requests
        self._tokenizer = tokenizer
        self._config = config
        self._waiting: dict[bytes, deque[PendingRequest]] = {}  # by client; the first one's turn is next
        self._running: dict[bytes, PendingRequest] = {}  # by client
        self._finished: deque[PendingRequest] = deque()  # filled by the threads
        self._pool = ThreadPoolExecutor(NUM_THREADS, "tokenizer")
        self.wakeup, self._waker = socket.socketpair()
        self.wakeup.setblocking(False)
        self._waker.setblocking(False)
        # The first call adjusts the tokenizer's settings, which must not happen while another thread uses it.
        tokenizer.encode("a", add_special_tokens=True)

    def __len__(self) -> int:
        return sum(pending.num_samples for pending in self._pending())

    @property
    def clients(self) -> set[bytes]:
        """The clients that wait for their requests to be taken."""
        return {pending.client for pending in self._pending() if not pending.dropped}

    def find(self, client: bytes, request_id: bytes) -> PendingRequest | None:
        """The request of this client and id that is still on its way."""
        found = (p for p in self._pending() if (p.client, p.request_id) == (client, request_id) and not p.dropped)
        return next(found, None)

    def take(self, client: bytes, request_id: bytes, message: protocol.Generate) -> None:
        """Begins with a request. Raises RequestError for what can be refused without reading its prompt."""
        self._check_room(1)  # before anything is spent on it
        num_characters = check_prompt(message)
        num_samples = read_params(message.params, 1, self.limits).n
        if num_samples > self._config.max_queue:
            most = self._config.max_queue
            raise RequestError(
                "invalid_request", f"n {num_samples} is more than this server works on: ask for {most} or less"
            )
        self._check_room(num_samples)
        is_first = client not in self._waiting and client not in self._running
        if is_first and num_characters <= MAX_INLINE_CHARACTERS:
            self._admit(client, request_id, message, read_prompt(message, self._tokenizer, self.limits))
            return
        texts = [message.prompt or message.prompt_tokens or ""]
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
        """Puts the requests whose prompts are known among those in flight, or answers them with an error."""
        with contextlib.suppress(BlockingIOError):
            self.wakeup.recv(4096)
        while self._finished:
            pending = self._finished.popleft()
            del self._running[pending.client]
            if not pending.dropped:
                self._finish(pending)
        self._start()

    def cancel(self, pending: PendingRequest) -> None:
        """Ends a request for its client."""
        cancelled = protocol.SampleEnd(finish_reason="cancelled", output_tokens=0, decode_steps=0)
        usage = protocol.Usage(prompt_tokens=0, output_tokens=0, decode_steps=0)
        samples = (cancelled,) * pending.num_samples if pending.num_samples > 1 else None
        done = protocol.Done(finish_reason="cancelled", text="", usage=usage, samples=samples)
        self._port.send(pending.client, pending.request_id, done)
        self._drop(pending, "cancelled")

    def cancel_all(self) -> None:
        """Ends all requests."""
        for pending in [p for p in self._pending() if not p.dropped]:
            self.cancel(pending)

    def forget(self, client: bytes) -> None:
        """Ends the requests of a client that is gone."""
        for pending in [p for p in self._pending() if p.client == client and not p.dropped]:
            self._drop(pending, "cancelled")

    def lose(self, error: protocol.Error) -> None:
        """Ends all requests with this error."""
        for pending in [p for p in self._pending() if not p.dropped]:
            self._port.send(pending.client, pending.request_id, error)
            self._drop(pending, "failed")

    def close(self) -> None:
        """Lets the threads end; one that is at work does so when it is done. May be called twice."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.wakeup.close()
        self._waker.close()

    def _pending(self) -> list[PendingRequest]:
        return [*self._running.values(), *(pending for queue in self._waiting.values() for pending in queue)]

    def _check_room(self, num_samples: int) -> None:
        num_held = len(self._requests) + len(self)
        if num_held + num_samples > self._config.max_queue:
            text = f"the server has {num_held} requests in flight, as many as it may"
            if num_held < self._config.max_queue:
                text = f"the server has {num_held} requests in flight and no room for {num_samples} samples more"
            raise RequestError("overloaded", text, retry_after=self._requests.retry_after())

    def _start(self) -> None:
        """Gives idle threads work: one request of a client at a time, the clients in turn."""
        for client in [client for client in self._waiting if client not in self._running]:
            if len(self._running) == NUM_THREADS:
                return
            queue = self._waiting.pop(client)
            self._running[client] = queue.popleft()
            if queue:
                self._waiting[client] = queue  # behind the others
            self._pool.submit(self._read, self._running[client])

    def _read(self, pending: PendingRequest) -> None:
        """What the threads do."""
        try:
            pending.prompt = read_prompt(pending.message, self._tokenizer, self.limits)
        except Exception as error:
            pending.error = error
        self._finished.append(pending)
        with contextlib.suppress(OSError):  # full: it is readable already; or closed
            self._waker.send(b"\0")

    def _finish(self, pending: PendingRequest) -> None:
        client, request_id = pending.client, pending.request_id
        try:
            if pending.error is not None:
                raise pending.error
            self._admit(client, request_id, pending.message, pending.prompt)
        except Exception as error:
            self._requests.counts["requests_rejected"] += 1
            self._port.send(client, request_id, error_reply(error))

    def _admit(self, client: bytes, request_id: bytes, message: protocol.Generate, prompt: np.ndarray) -> None:
        params = read_params(message.params, len(prompt), self.limits)
        queued = protocol.Queued(prompt_tokens=prompt.tobytes(), seed=params.seed, fingerprint=self.fingerprint)
        self._port.send(client, request_id, queued)
        self._requests.add(client, request_id, prompt, params)

    def _drop(self, pending: PendingRequest, outcome: str) -> None:
        """Forgets a request. One that a thread is at work on still counts until that is done."""
        self._requests.counts[f"requests_{outcome}"] += 1
        pending.dropped = True
        queue = self._waiting.get(pending.client)
        if queue and pending in queue:
            queue.remove(pending)
            if not queue:
                del self._waiting[pending.client]
