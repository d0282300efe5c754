"""The messages between the front end's process and the engine's, and the socket pair that carries them.

Both ends are ours, so the schema is for clarity rather than defence; still nothing here can run code. The engine
binds in a directory of its own that only its user may enter and removes it as soon as the front end is there, so
that from then on nothing is left behind whichever of the two dies.
"""

import contextlib
import dataclasses
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import zmq

from euryale.client import wire
from euryale.client.wire import Ints, Kind, PackedTokens, message
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_result import RequestOutput, TokenLogprobs

MAX_SOCKET_DIRECTORY = 70  # bytes; the path of a unix socket ends at 107


class LinkLost(ConnectionError):
    """The process at the other end is gone."""


def _unpack_params(value: dict[str, Any]) -> SamplingParams:
    lists = {name: tuple(value[name]) for name in ("stop", "stop_token_ids")}
    return SamplingParams(**value | lists | {"logit_bias": tuple(tuple(pair) for pair in value["logit_bias"])})


def pack_logprobs(value: TokenLogprobs) -> list[bytes]:
    """Return the three arrays as little-endian bytes."""
    parts = ((value.chosen, "<f4"), (value.top_ids, "<i4"), (value.top, "<f4"))
    return [array.astype(dtype, copy=False).tobytes() for array, dtype in parts]


def unpack_logprobs(value: list[bytes]) -> TokenLogprobs:
    """The inverse of ``pack_logprobs``."""
    chosen, top_ids, top = (
        np.frombuffer(part, dtype) for part, dtype in zip(value, ("<f4", "<i4", "<f4"), strict=True)
    )
    width = len(top_ids) // max(len(chosen), 1)
    return TokenLogprobs(chosen, top_ids.reshape(len(chosen), width), top.reshape(len(chosen), width))


def _pack_outputs(outputs: Sequence[RequestOutput]) -> list[list[Any]]:
    return [
        [key, wire.pack_tokens(tokens), reason and str(reason), *_pack_reports(reports)]
        for key, tokens, reason, *reports in outputs
    ]


def _pack_reports(reports: list[TokenLogprobs | None]) -> list[list[bytes] | None]:
    """Most outputs have no log-probabilities and send nothing in their place."""
    packed = [None if part is None else pack_logprobs(part) for part in reports]
    return packed if any(part is not None for part in packed) else []


def _unpack_outputs(value: list[list[Any]]) -> tuple[RequestOutput, ...]:
    return tuple(
        RequestOutput(
            key,
            list(wire.unpack_tokens(tokens)),
            reason,
            *(None if part is None else unpack_logprobs(part) for part in reports),
        )
        for key, tokens, reason, *reports in value
    )


ParamsField = Annotated[SamplingParams, Kind("sampling parameters", _unpack_params, dataclasses.asdict)]
Outputs = Annotated[Sequence[RequestOutput], Kind("outputs", _unpack_outputs, _pack_outputs)]


# ---- front end to engine


@message("attach")
@dataclass(frozen=True, kw_only=True)
class Attach:
    """First message: the front end listens at ``endpoint``."""

    endpoint: str


@message("failed")
@dataclass(frozen=True, kw_only=True)
class Failed:
    """Sent instead of Attach by a front end that cannot start; ``reason`` says why, for people. Its process ends."""

    reason: str


@message("add")
@dataclass(frozen=True, kw_only=True)
class AddRequest:
    """A checked request, with a key for each of its samples, in their order: to the engine each is a request. Keys are
    unique for the life of the front end. ``prompt`` is packed; only the first sample tells its log-probabilities."""

    keys: Ints
    prompt: PackedTokens
    params: ParamsField

    def samples(self) -> Iterator[tuple[int, int, SamplingParams]]:
        """Each sample's key, index and parameters."""
        others = self.params
        if len(self.keys) > 1 and others.prompt_logprobs is not None:
            others = dataclasses.replace(others, prompt_logprobs=None)
        for index, key in enumerate(self.keys):
            yield key, index, others if index else self.params


@message("cancel")
@dataclass(frozen=True, kw_only=True)
class CancelRequest:
    """Ends a request; acknowledged by its last RequestOutput. Unknown keys (it ended just now) are to be ignored."""

    key: int


@message("drain")
@dataclass(frozen=True, kw_only=True)
class Drain:
    """Nothing is in flight and nothing will follow: stop, and say Drained."""


# ---- engine to front end


@message("loading")
@dataclass(frozen=True, kw_only=True)
class Loading:
    """Answer to Attach: the model is being loaded, which may take minutes of silence; Welcome follows."""


@message("welcome")
@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The engine is ready. ``info`` holds model, fingerprint, max_model_len, vocab_size, world_size, num_medusa_heads,
    defaults (a map of SamplingParams fields) and, optionally, max_request_tokens (prompt and answer together)."""

    info: dict


@message("step")
@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What one step gave, for all its requests at once."""

    outputs: Outputs


@message("rejected")
@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A request the engine cannot take, or had to give up; ``code`` as in docs/protocol.md. Final for its key."""

    key: int
    code: str
    message: str


@message("stats")
@dataclass(frozen=True, kw_only=True)
class Stats:
    """The engine's counters; also its sign of life, to be sent at least once a second."""

    values: dict


@message("begin_drain")
@dataclass(frozen=True, kw_only=True)
class BeginDrain:
    """The group was asked to stop: take no new requests, finish the rest, then send Drain."""


@message("drained")
@dataclass(frozen=True, kw_only=True)
class Drained:
    """Answer to Drain: the engine stops."""


TO_ENGINE = {cls.type: cls for cls in (Attach, Failed, AddRequest, CancelRequest, Drain)}
TO_FRONT_END = {cls.type: cls for cls in (Loading, Welcome, StepOutput, Rejected, Stats, BeginDrain, Drained)}


class _Link:
    """One end of the socket pair. To be used by one thread."""

    def __init__(self, incoming: dict[str, type]) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.linger = 0
        # Without a high-water mark: neither process may ever wait for the other, and what can queue up is bounded by
        # the front end, which limits the requests in flight and with them the tokens that can be under way.
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.lost = False  # the other process is gone; what it had sent can still be received
        self._incoming = incoming

    def send(self, message: Any) -> None:
        """Sends without waiting. Raises LinkLost if nobody is there."""
        # Not left to the socket alone: for a moment after a loss it still takes messages that nobody will read.
        if not self.lost:
            with contextlib.suppress(zmq.Again):
                self.socket.send(wire.encode(message), zmq.DONTWAIT)
                return
        raise LinkLost("the process at the other end of the link is gone")

    def receive(self, timeout_ms: int = 0) -> list[Any]:
        """All messages that are there, in order, after waiting up to ``timeout_ms`` for the first one.

        Returns early, and empty, when the other process dies; see ``lost``.
        """
        if timeout_ms and not self.lost and not self.socket.poll(0):
            poller = zmq.Poller()
            poller.register(self.socket, zmq.POLLIN)
            poller.register(self.monitor, zmq.POLLIN)
            poller.poll(timeout_ms)
        lost = self._read_monitor()  # before the messages, so that none that was sent is missed
        messages = []
        with contextlib.suppress(zmq.Again):
            while True:
                messages.append(
                    wire.build(wire.unpack_map(self.socket.recv(zmq.DONTWAIT)), self._incoming, strict=True)
                )
        self.lost = self.lost or lost
        return messages

    def close(self, linger_ms: int = 0) -> None:
        """Closes the socket, giving what was sent ``linger_ms`` to leave. May be called twice."""
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
    """The engine's end: binds at ``endpoint``, which the front end's process has to be told."""

    def __init__(self) -> None:
        super().__init__(TO_ENGINE)
        base = tempfile.gettempdir()
        self._directory: str | None = tempfile.mkdtemp(
            prefix="euryale-", dir=base if len(os.fsencode(base)) < MAX_SOCKET_DIRECTORY else "/tmp"
        )
        self.endpoint = f"ipc://{self._directory}/link"
        self.socket.bind(self.endpoint)

    def receive(self, timeout_ms: int = 0) -> list[Any]:
        """See ``_Link.receive``; with the first message the directory of the endpoint goes."""
        messages = super().receive(timeout_ms)
        if messages:
            self._remove_directory()
        return messages

    def close(self, linger_ms: int = 1000) -> None:
        """Closes the socket, giving the last messages a second to leave, and leaves no file."""
        super().close(linger_ms)
        self._remove_directory()

    def _remove_directory(self) -> None:
        directory, self._directory = self._directory, None
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


class FrontEndLink(_Link):
    """The front end's end: connects to the engine's endpoint."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(TO_FRONT_END)
        self.socket.connect(endpoint)
