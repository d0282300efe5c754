"""The messages between a client and the front end, and the limits of both sides; docs/protocol.md explains them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from euryale.client.logprobs import Logprobs, pack_logprobs, unpack_logprobs
from euryale.client.params import PROMPT_RULES
from euryale.client.rules import shown
from euryale.client.wire import Ints, Kind, PackedTokens, Tokens, expect, message, message_table

DEFAULT_ADDRESS = "tcp://127.0.0.1:5555"
MAX_REQUEST_ID_BYTES = 64
DEFAULT_MAX_MESSAGE_BYTES = 4 << 20
# In milliseconds. Both sides ping; a peer that answers no ping for the timeout counts as disconnected.
HEARTBEAT_INTERVAL_MS = 2_000
HEARTBEAT_TIMEOUT_MS = 10_000
HANDSHAKE_INTERVAL_MS = 5_000


def _unpack_chat(value: Any) -> tuple[dict[str, str], ...]:
    rule = PROMPT_RULES["messages"]
    if not rule.fits(value):
        raise ValueError(f"must be {rule.says}, not {shown(value)}")
    return tuple(value)


Chat = Annotated[tuple[dict[str, str], ...], Kind("list of {role, content}", _unpack_chat, list)]
StopCause = Annotated[str | int, Kind("str or int", expect(str, int))]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a request used: prompt tokens, output tokens, and the decoding steps that emitted these."""

    prompt_tokens: int
    output_tokens: int
    decode_steps: int


def _unpack_usage(value: Any) -> Usage:
    fields = ("prompt_tokens", "output_tokens", "decode_steps")
    if not isinstance(value, dict) or not all(type(value.get(name)) is int for name in fields):
        raise ValueError(f"must be a map with the whole numbers {', '.join(fields)}, not {shown(value)}")
    return Usage(**{name: value[name] for name in fields})


UsageField = Annotated[Usage, Kind("usage", _unpack_usage, lambda usage: dict(vars(usage)))]


@dataclass(frozen=True, kw_only=True)
class SampleEnd:
    """How one of several samples ended; the fields are those of ``Done``."""

    finish_reason: str
    output_tokens: int
    decode_steps: int
    stop: str | int | None = None


def _pack_ends(ends: Sequence[SampleEnd]) -> list[dict[str, Any]]:
    return [{name: value for name, value in vars(end).items() if value is not None} for end in ends]


def _unpack_ends(value: Any) -> tuple[SampleEnd, ...]:
    kinds = {"finish_reason": str, "output_tokens": int, "decode_steps": int}
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("must be a list of maps")
    if not all(type(item.get(name)) is kind for item in value for name, kind in kinds.items()):
        raise ValueError(f"must be a list of maps with {', '.join(kinds)}")
    if not all(type(item.get("stop")) in (str, int, type(None)) for item in value):
        raise ValueError("must be a list of maps with a stop that is a string or an integer, if there is one")
    return tuple(SampleEnd(**{name: item.get(name) for name in (*kinds, "stop")}) for item in value)


Ends = Annotated[tuple[SampleEnd, ...], Kind("list of ends", _unpack_ends, _pack_ends)]
# Left out if it is 0, as for every request with one sample.
SampleIndex = Annotated[int, Kind("int", expect(int), lambda index: index or None)]
LogprobsField = Annotated[Logprobs, Kind("logprobs", unpack_logprobs, pack_logprobs)]


# ---- client to server


@message("hello")
@dataclass(frozen=True, kw_only=True)
class Hello:
    """Asks for the server's model and limits; answered by ServerInfo."""


@message("generate")
@dataclass(frozen=True, kw_only=True)
class Generate:
    """Asks for a continuation of exactly one of prompt, prompt_tokens and messages (chat)."""

    prompt: str | None = None
    prompt_tokens: PackedTokens | None = None
    messages: Chat | None = None
    params: dict[str, Any] = field(default_factory=dict)


@message("cancel")
@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Ends the request ``target`` of the same connection; answered by CancelReply."""

    target: bytes


@message("stats")
@dataclass(frozen=True, kw_only=True)
class Stats:
    """Asks for counters; answered by StatsReply."""


@message("health")
@dataclass(frozen=True, kw_only=True)
class Health:
    """Asks for the server's status; answered by HealthReply."""


@message("drain")
@dataclass(frozen=True, kw_only=True)
class Drain:
    """Asks the server to finish its requests, refuse new ones and stop; answered by Drained."""


# ---- server to client


@message("welcome")
@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """The server's model and limits. ``defaults`` are the sampling parameters of a request that gives none."""

    model: str
    fingerprint: str
    max_model_len: int
    vocab_size: int
    tensor_parallel_size: int
    num_medusa_heads: int
    chat: bool
    max_message_bytes: int
    defaults: dict[str, Any]


@message("queued")
@dataclass(frozen=True, kw_only=True)
class Queued:
    """First reply to a generate that was accepted. With these values, the same answer can be requested again."""

    prompt_tokens: Tokens
    seed: int
    fingerprint: str


@message("delta")
@dataclass(frozen=True, kw_only=True)
class Delta:
    """New tokens of an answer. ``index`` is the number of tokens before the first of them.

    ``tokens_per_step`` lists how many tokens each decoding step emitted. ``text`` may lag behind the tokens: incomplete
    characters and possible beginnings of a stop string are held back. ``sample_index`` numbers the answers to a request
    with ``n`` > 1. ``logprobs``: of the tokens. ``prompt_logprobs``: in the first delta, of the prompt from its second
    token on. Both are None if not requested.
    """

    index: int
    tokens: Tokens
    text: str
    tokens_per_step: Ints
    sample_index: SampleIndex = 0
    logprobs: LogprobsField | None = None
    prompt_logprobs: LogprobsField | None = None


@message("done")
@dataclass(frozen=True, kw_only=True)
class Done:
    """Last reply to a generate. ``text`` is what was held back, ``stop`` the stop string or token that ended the
    answer.

    With several samples, ``samples`` has the end of each, the deltas have all text, and ``usage`` is the sum.
    ``finish_reason`` and ``stop`` are then the first sample's, unless the request was cancelled.
    """

    finish_reason: str
    text: str
    usage: UsageField
    stop: StopCause | None = None
    samples: Ends | None = None


@message("error")
@dataclass(frozen=True, kw_only=True)
class Error:
    """Last reply to a request that failed. ``retry_after`` in seconds. ``request_id`` is set only if the frame has
    none.
    """

    code: str
    message: str
    retry_after: float | None = None
    request_id: bytes | None = None


@message("cancelled")
@dataclass(frozen=True, kw_only=True)
class CancelReply:
    """Whether the request to cancel was in flight."""

    found: bool


@message("stats_report")
@dataclass(frozen=True, kw_only=True)
class StatsReply:
    """Counters and gauges of engine and front end."""

    values: dict[str, Any]


@message("health_report")
@dataclass(frozen=True, kw_only=True)
class HealthReply:
    """``status`` is ok, draining or stalled; ``engine_age`` and ``uptime`` in seconds."""

    status: str
    engine_age: float
    uptime: float


@message("drained")
@dataclass(frozen=True, kw_only=True)
class Drained:
    """All requests have ended, and the server stops."""


@message("alive")
@dataclass(frozen=True, kw_only=True)
class Alive:
    """Sent about once a second, with an empty request id, to connections with requests in flight."""


REQUESTS = message_table(Hello, Generate, Cancel, Stats, Health, Drain)
REPLIES = message_table(ServerInfo, Queued, Delta, Done, Error, CancelReply, StatsReply, HealthReply, Drained, Alive)
STREAMED = (Queued, Delta)  # replies after which more follow
