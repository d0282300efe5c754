"""The messages between the front end's process and the engine's, and how their fields are packed.

Both ends belong to this package, so the schema documents the messages rather than defends against them. Unpacking still
cannot run code.
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
    """Return ``chosen``, ``top_ids`` and ``top`` as little-endian bytes."""
    parts = ((value.chosen, "<f4"), (value.top_ids, "<i4"), (value.top, "<f4"))
    return [array.astype(dtype, copy=False).tobytes() for array, dtype in parts]


def unpack_logprobs(value: list[bytes]) -> TokenLogprobs:
    """Invert ``pack_logprobs``."""
    chosen, top_ids, top = (
        np.frombuffer(part, dtype) for part, dtype in zip(value, ("<f4", "<i4", "<f4"), strict=True)
    )
    width = len(top_ids) // max(len(chosen), 1)
    return TokenLogprobs(chosen, top_ids.reshape(len(chosen), width), top.reshape(len(chosen), width))


def _pack_outputs(outputs: Sequence[RequestOutput]) -> list[list[Any]]:
    return [
        [key, wire.pack_tokens(tokens), reason and str(reason), *_pack_optional(logprobs)]
        for key, tokens, reason, *logprobs in outputs
    ]


def _pack_optional(parts: list[TokenLogprobs | None]) -> list[list[bytes] | None]:
    """Pack an output's log-probabilities. Most outputs have none and send nothing in their place."""
    packed = [None if part is None else pack_logprobs(part) for part in parts]
    return packed if any(part is not None for part in packed) else []


def _unpack_outputs(value: list[list[Any]]) -> tuple[RequestOutput, ...]:
    return tuple(
        RequestOutput(
            key,
            list(wire.unpack_tokens(tokens)),
            reason,
            *(None if part is None else unpack_logprobs(part) for part in parts),
        )
        for key, tokens, reason, *parts in value
    )


ParamsField = Annotated[SamplingParams, Kind("sampling parameters", _unpack_params, dataclasses.asdict)]
Outputs = Annotated[Sequence[RequestOutput], Kind("outputs", _unpack_outputs, _pack_outputs)]


# ---- front end to engine


@message("attach")
@dataclass(frozen=True, kw_only=True)
class Attach:
    """First message: the front end listens for clients at ``endpoint``."""

    endpoint: str


@message("failed")
@dataclass(frozen=True, kw_only=True)
class Failed:
    """Sent instead of Attach by a front end that cannot start, before it exits. ``reason`` is for the user."""

    reason: str


@message("add")
@dataclass(frozen=True, kw_only=True)
class AddRequest:
    """A checked request, with a key for each of its samples, which are separate requests to the engine.

    Keys are unique for the life of the front end. ``prompt``: packed int32. Only the first sample gets
    log-probabilities of the prompt.
    """

    keys: Ints
    prompt: PackedTokens
    params: ParamsField

    def samples(self) -> Iterator[tuple[int, int, SamplingParams]]:
        """Yield each sample's key, index and parameters."""
        others = self.params
        if len(self.keys) > 1 and others.prompt_logprobs is not None:
            others = dataclasses.replace(others, prompt_logprobs=None)
        for index, key in enumerate(self.keys):
            yield key, index, others if index else self.params


@message("cancel")
@dataclass(frozen=True, kw_only=True)
class CancelRequest:
    """Cancel a request; its last RequestOutput acknowledges it. An unknown key is ignored, as it has just ended."""

    key: int


@message("drain")
@dataclass(frozen=True, kw_only=True)
class Drain:
    """Nothing is in flight and nothing will follow: answer Drained and stop."""


# ---- engine to front end


@message("loading")
@dataclass(frozen=True, kw_only=True)
class Loading:
    """Answer to Attach: the engine loads the model and sends nothing for up to minutes. Welcome follows."""


@message("welcome")
@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The engine is ready. ``info`` describes it.

    It holds model, fingerprint, max_model_len, vocab_size, world_size, num_medusa_heads, defaults (a map of
    SamplingParams fields) and, optionally, max_request_tokens (of prompt and answer together).
    """

    info: dict


@message("step")
@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """The outputs of one step for all its requests."""

    outputs: Outputs


@message("rejected")
@dataclass(frozen=True, kw_only=True)
class Rejected:
    """The engine refuses a request or gives it up. ``code``: as in docs/protocol.md. Final for its key."""

    key: int
    code: str
    message: str


@message("stats")
@dataclass(frozen=True, kw_only=True)
class Stats:
    """The engine's counters, sent about twice a second; they also serve as its heartbeat."""

    values: dict


@message("begin_drain")
@dataclass(frozen=True, kw_only=True)
class BeginDrain:
    """The group was asked to stop: refuse new requests, finish the others, then send Drain."""


@message("drained")
@dataclass(frozen=True, kw_only=True)
class Drained:
    """Answer to Drain: the engine stops."""


def _by_name(*classes: type[Any]) -> dict[str, type]:
    return {cls.type: cls for cls in classes}


TO_ENGINE = _by_name(Attach, Failed, AddRequest, CancelRequest, Drain)
TO_FRONT_END = _by_name(Loading, Welcome, StepOutput, Rejected, Stats, BeginDrain, Drained)
