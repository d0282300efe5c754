"""The front end: takes requests from clients, passes them to the engine and sends the results back.

One loop serves two sockets. It never waits for a client or the engine, and other threads tokenize long prompts
(``intake.py``). Every request ends with exactly one final message. A bad message causes an error for its sender only.
The front end knows neither the model nor the scheduler.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import zmq

from euryale.client import protocol, wire
from euryale.frontend import messages
from euryale.frontend.client_socket import ClientPort
from euryale.frontend.config import FrontEndConfig
from euryale.frontend.detokenizer import TokenBytes
from euryale.frontend.engine_link import FrontEndLink
from euryale.frontend.in_flight import InFlight
from euryale.frontend.intake import Intake, error_reply
from euryale.frontend.validation import RequestError, RequestLimits

logger = logging.getLogger("euryale.frontend")

MAX_TURN_MESSAGES = 16  # client messages read in one turn of the loop, before the engine's are read again
MAX_TURN_SECONDS = 0.01  # after which a turn reads no further client message
MAX_DRAINERS = 64  # clients that may wait for the drain
PROBE_INTERVAL = 1.0  # seconds between Alive messages to waiting clients, which also reveal clients that left
PROBE_DELAY = 0.02  # seconds after a lost connection until ZeroMQ knows whose it was
BACKLOG_INTERVAL = 0.02  # seconds between attempts to send queued messages
MIN_EMPTY_READS = 8  # empty reads of the link before the engine may be considered dead
STALLED_AFTER = 3.0  # seconds of the engine's silence after which health reports "stalled"
FINAL_LINGER_MS = 1000


class FrontEnd:
    """The server's side of the protocol, for the engine at the other end of ``link``.

    ``tokenizer``: a transformers fast tokenizer, or an object with its encode, decode, apply_chat_template and
    chat_template. The constructor listens at ``config.bind`` and raises ValueError if it cannot. ``endpoint`` is the
    actual address.
    """

    def __init__(self, tokenizer: Any, link: FrontEndLink, config: FrontEndConfig | None = None) -> None:
        self._config = config or FrontEndConfig()
        self._tokenizer = tokenizer
        self._link = link
        self._port = ClientPort(link.context, self._config)
        self.endpoint = self._port.endpoint
        self._requests = InFlight(self._port, link, TokenBytes(tokenizer))
        self._intake = Intake(self._port, self._requests, tokenizer, self._config)
        self._info: dict[str, Any] = {}
        self._limits: RequestLimits | None = None  # known with ``_info`` after the engine's Welcome
        # Seconds without a message from the engine. The time between two reads of the link counts up to this thread's
        # longest sleep: a longer gap means that this process was not running.
        self._silence = 0.0
        self._longest_sleep = min(1.0, self._config.engine_timeout / MIN_EMPTY_READS)
        self._is_loading = False  # the engine loads its model and sends nothing
        self._drainers: dict[tuple[bytes, bytes], None] = {}  # client and request id, in order
        self._drain_requested = False  # set by begin_drain, which may run in a signal handler
        self._drain_deadline: float | None = None  # set while draining
        self._drain_sent = False
        self._outcome: str | None = None
        self._started = self._last_read = time.monotonic()
        self._next_probe = 0.0
        self._engine_stats: dict[str, Any] = {}
        self._handlers: dict[type, Callable[[bytes, bytes, Any], None]] = {
            protocol.Hello: self._hello,
            protocol.Generate: self._generate,
            protocol.Cancel: self._cancel,
            protocol.Stats: self._stats,
            protocol.Health: self._health,
            protocol.Drain: self._drain,
        }

    def run(self) -> str:
        """Serve until drained or until the engine is lost. Closes all sockets and returns "drained" or "group_lost"."""
        poller = zmq.Poller()
        for source in (
            self._port.socket,
            self._port.monitor,
            self._link.socket,
            self._link.monitor,
            self._intake.wakeup,
        ):
            poller.register(source, zmq.POLLIN)
        try:
            self._started = self._last_read = time.monotonic()
            self._link.send(messages.Attach(endpoint=self.endpoint))
            while self._outcome is None:
                poller.poll(self._sleep_ms())
                self._turn()
        finally:
            self.close()
        return self._outcome

    def begin_drain(self) -> None:
        """Ask ``run`` to refuse new requests, finish the others and return. Safe to call from a signal handler."""
        self._drain_requested = True

    def close(self) -> None:
        """Close the sockets. Queued messages get a second to be sent. May be called twice."""
        self._intake.close()
        self._port.close(FINAL_LINGER_MS)
        self._link.close(FINAL_LINGER_MS)

    # ---- the loop

    def _sleep_ms(self) -> int:
        if self._port.has_backlog:
            return int(1000 * BACKLOG_INTERVAL)
        seconds = min(self._longest_sleep, self._next_probe - time.monotonic(), self._port.watch_delay)
        return max(0, int(1000 * seconds) + 1)

    def _turn(self) -> None:
        if self._port.read_monitor():
            self._next_probe = min(self._next_probe, time.monotonic() + PROBE_DELAY)
        self._read_engine()
        self._requests.flush()
        self._intake.advance()
        if self._limits is not None:  # clients wait until the engine's Welcome
            started = time.monotonic()
            for client, *frames in self._port.receive(MAX_TURN_MESSAGES):
                self._from_client(client, frames)
                if time.monotonic() - started > MAX_TURN_SECONDS:
                    break
        self._run_timers(time.monotonic())

    def _read_engine(self) -> None:
        received = self._link.receive()
        now = time.monotonic()
        if received or self._is_loading:
            self._silence = 0.0
        else:
            self._silence += min(now - self._last_read, self._longest_sleep)
        self._last_read = now
        for message in received:
            self._from_engine(message)

    def _run_timers(self, now: float) -> None:
        """Do what no message triggers: retries, probes, clients that left, the drain and the engine's timeout."""
        self._port.retry()
        self._port.watch(now)
        if now >= self._next_probe:
            self._next_probe = now + PROBE_INTERVAL
            for client in self._requests.clients | self._intake.clients | {client for client, _ in self._drainers}:
                self._port.send(client, b"", protocol.Alive())
        for client in self._port.take_gone():
            self._requests.forget(client)
            self._intake.forget(client)
            self._drainers = {drainer: None for drainer in self._drainers if drainer[0] != client}
        if self._drain_requested:
            self._advance_drain(now)
        if self._outcome is None and (self._link.lost or self._silence > self._config.engine_timeout):
            lost = self._link.lost
            self._lose_group("the engine's process ended" if lost else f"no message for {self._silence:.0f} seconds")

    def _advance_drain(self, now: float) -> None:
        if self._drain_deadline is None:
            self._drain_deadline = now + self._config.drain_timeout
        elif now > self._drain_deadline:
            self._intake.cancel_all()
            self._requests.cancel_all()
        has_unread = self._port.has_backlog and now <= self._drain_deadline  # may include final messages
        has_work = self._requests or self._intake.clients
        if not has_work and not has_unread and not self._drain_sent and not self._link.lost:
            self._drain_sent = True
            self._link.send(messages.Drain())

    def _lose_group(self, reason: str) -> None:
        num_lost = len(self._requests) + len(self._intake)
        logger.error("the model's processes are lost (%s), and %d requests with them", reason, num_lost)
        text = f"the model's processes are lost ({reason}): restart the server; its log says more"
        error = protocol.Error(code="group_lost", message=text)
        self._requests.lose(error)
        self._intake.lose(error)
        for client, request_id in self._drainers:
            self._port.send(client, request_id, error)
        self._outcome = "group_lost"

    def _from_engine(self, message: Any) -> None:
        self._is_loading = isinstance(message, messages.Loading)
        match message:
            case messages.StepOutput():
                for output in message.outputs:
                    self._requests.take(output)
            case messages.Stats():
                self._engine_stats = message.values
            case messages.Rejected():
                self._requests.reject(message.key, protocol.Error(code=message.code, message=message.message))
            case messages.Welcome():
                self._info = message.info
                max_model_len = message.info["max_model_len"]
                self._intake.fingerprint = message.info["fingerprint"]
                self._limits = self._intake.limits = RequestLimits(
                    max_tokens=min(max_model_len, message.info.get("max_request_tokens", max_model_len)),
                    vocab_size=message.info["vocab_size"],
                    defaults=message.info["defaults"],
                )
            case messages.BeginDrain():
                self.begin_drain()
            case messages.Drained():
                for client, request_id in self._drainers:
                    self._port.send(client, request_id, protocol.Drained())
                self._outcome = "drained"

    # ---- from clients

    def _from_client(self, client: bytes, frames: list[bytes]) -> None:
        request_id = frames[0] if frames and 0 < len(frames[0]) <= protocol.MAX_REQUEST_ID_BYTES else b""
        try:
            is_open = self._requests.find(client, request_id) or self._intake.find(client, request_id)
            if is_open or (client, request_id) in self._drainers:
                self._refuse_duplicate(client, request_id)
                return
            message = self._read(request_id, frames)
            self._handlers[type(message)](client, request_id, message)
        except Exception as error:
            self._requests.counts["requests_rejected"] += 1
            self._port.send(client, request_id, error_reply(error))

    def _refuse_duplicate(self, client: bytes, request_id: bytes) -> None:
        """Send the error without the request id, under which it would end the request in flight."""
        self._requests.counts["requests_rejected"] += 1
        text = "a request with this id is in flight and continues; this one is dropped: send it with another id"
        error = protocol.Error(code="duplicate_request_id", message=text, request_id=request_id)
        self._port.send(client, b"", error)

    def _read(self, request_id: bytes, frames: list[bytes]) -> Any:
        if not request_id:
            most = protocol.MAX_REQUEST_ID_BYTES
            raise RequestError("malformed", f"the first frame must be a request id of 1 to {most} bytes")
        if len(frames) != 2:
            count = str(len(frames)) if len(frames) < 3 else "more"
            raise RequestError("malformed", f"a message has two frames, request id and body, not {count}")
        size, most = len(frames[1]), self._config.max_message_bytes
        if size > most:
            raise RequestError(
                "too_large",
                f"the message has {size} bytes and this server accepts {most}: shorten it, or raise "
                "--max-message-bytes",
            )
        return wire.decode(frames[1], protocol.REQUESTS, strict=True)

    def _hello(self, client: bytes, request_id: bytes, _: protocol.Hello) -> None:
        info, limits = self._info, self._limits
        assert limits is not None, "clients wait until limits are known"
        reply = protocol.ServerInfo(
            model=info["model"],
            fingerprint=info["fingerprint"],
            max_model_len=limits.max_tokens,
            vocab_size=info["vocab_size"],
            tensor_parallel_size=info["world_size"],
            num_medusa_heads=info["num_medusa_heads"],
            chat=bool(self._tokenizer.chat_template),
            max_message_bytes=self._config.max_message_bytes,
            defaults=info["defaults"],
        )
        self._port.send(client, request_id, reply)

    def _generate(self, client: bytes, request_id: bytes, message: protocol.Generate) -> None:
        self._requests.counts["requests_received"] += 1
        if self._drain_requested:
            raise RequestError("draining", "the server is stopping and takes no new requests")
        self._intake.take(client, request_id, message)

    def _cancel(self, client: bytes, request_id: bytes, message: protocol.Cancel) -> None:
        request = self._requests.find(client, message.target)
        pending = self._intake.find(client, message.target)
        if request is not None:
            self._requests.cancel(request)
        elif pending is not None:
            self._intake.cancel(pending)
        found = request is not None or pending is not None
        self._port.send(client, request_id, protocol.CancelReply(found=found))

    def _stats(self, client: bytes, request_id: bytes, _: protocol.Stats) -> None:
        num_held = len(self._requests) + len(self._intake)
        gauges = {"requests_in_flight": num_held, "clients": self._port.num_clients}
        values = {**self._engine_stats, **self._requests.counts, **gauges}
        self._port.send(client, request_id, protocol.StatsReply(values=values))

    def _health(self, client: bytes, request_id: bytes, _: protocol.Health) -> None:
        status = "draining" if self._drain_requested else "stalled" if self._silence > STALLED_AFTER else "ok"
        uptime = time.monotonic() - self._started
        reply = protocol.HealthReply(status=status, engine_age=self._silence, uptime=uptime)
        self._port.send(client, request_id, reply)

    def _drain(self, client: bytes, request_id: bytes, _: protocol.Drain) -> None:
        if len(self._drainers) >= MAX_DRAINERS:
            text = f"{MAX_DRAINERS} clients already wait for the drain: try again after retry_after seconds"
            raise RequestError("overloaded", text, retry_after=1.0)
        self._drainers[client, request_id] = None
        self.begin_drain()
