"""The messages between the front end's process and the engine's: their types, and how they are packed.

Both ends are ours, so the schema is for clarity rather than defence; still nothing here can run code.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from euryale.client import wire
from euryale.client.wire import Ints, Kind, PackedTokens, message
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_result import RequestOutput, TokenLogprobs


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
