"""The messages between a client and the front end, and the limits both sides keep; docs/protocol.md in code."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from euryale.client.logprobs import Logprobs, pack_logprobs, unpack_logprobs
from euryale.client.params import PROMPT_RULES
from euryale.client.rules import shown
from euryale.client.wire import Ints, Kind, PackedTokens, Tokens, expect, message

DEFAULT_ADDRESS = "tcp://127.0.0.1:5555"
MAX_REQUEST_ID_BYTES = 64
DEFAULT_MAX_MESSAGE_BYTES = 4 << 20
# Both sides ping; a peer that answers no ping for this long is gone. Milliseconds.
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
    """What a request took: tokens read, tokens written, and decoding steps that wrote them."""

    prompt_tokens: int
    output_tokens: int
    decode_steps: int


def _unpack_usage(value: Any) -> Usage:
    names = ("prompt_tokens", "output_tokens", "decode_steps")
    if not isinstance(value, dict) or not all(type(value.get(name)) is int for name in names):
        raise ValueError(f"must be a map with the whole numbers {', '.join(names)}, not {shown(value)}")
    return Usage(**{name: value[name] for name in names})


UsageField = Annotated[Usage, Kind("usage", _unpack_usage, lambda usage: dict(vars(usage)))]


@dataclass(frozen=True, kw_only=True)
class SampleEnd:
    """How one of several samples ended: as ``Done`` says it of a single one."""

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
# Left out where it is 0, as in every answer to a request for one sample.
SampleIndex = Annotated[int, Kind("int", expect(int), lambda index: index or None)]
LogprobsField = Annotated[Logprobs, Kind("logprobs", unpack_logprobs, pack_logprobs)]


# ---- client to server


@message("hello")
@dataclass(frozen=True, kw_only=True)
class Hello:
    """Asks who is there; answered by ServerInfo."""


@message("generate")
@dataclass(frozen=True, kw_only=True)
class Generate:
    """Asks for a continuation of exactly one of prompt, prompt_tokens or messages (chat)."""

    prompt: str | None = None
    prompt_tokens: PackedTokens | None = None
    messages: Chat | None = None
    params: dict = field(default_factory=dict)


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
    """Asks whether the server works; answered by HealthReply."""


@message("drain")
@dataclass(frozen=True, kw_only=True)
class Drain:
    """Asks the server to finish what runs, take nothing new, and stop; answered by Drained."""


# ---- server to client


@message("welcome")
@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """The model behind the server and its limits. ``defaults`` are the sampling parameters of a bare request."""

    model: str
    fingerprint: str
    max_model_len: int
    vocab_size: int
    tensor_parallel_size: int
    num_medusa_heads: int
    chat: bool
    max_message_bytes: int
    defaults: dict


@message("queued")
@dataclass(frozen=True, kw_only=True)
class Queued:
    """First reply of a generate that was taken: what would have to be sent to get the same answer again."""

    prompt_tokens: Tokens
    seed: int
    fingerprint: str


@message("delta")
@dataclass(frozen=True, kw_only=True)
class Delta:
    """New tokens of an answer. ``index`` is the first one's position in the answer.

    ``tokens_per_step`` lists how many tokens each decoding step gave. ``text`` may lag behind the tokens: a character
    needs all its bytes, and what could be the beginning of a stop string is held back. ``sample_index`` tells the
    answers to a request for several apart. ``logprobs`` of the tokens and, in the first delta, ``prompt_logprobs`` of
    the prompt's tokens but the first: None unless asked for.
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
    """Last reply of a generate. ``text`` is what was held back; ``stop`` the stop string or token that ended it.

    Of several samples ``samples`` has the ends, and the deltas all the text; ``finish_reason`` and ``stop`` are then
    the first one's, unless the request was cancelled, and ``usage`` sums up.
    """

    finish_reason: str
    text: str
    usage: UsageField
    stop: StopCause | None = None
    samples: Ends | None = None


@message("error")
@dataclass(frozen=True, kw_only=True)
class Error:
    """Last reply of a request that failed. ``retry_after`` in seconds. ``request_id`` only where the frame has none."""

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

    values: dict


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
    """Everything that ran is finished; the server stops."""


@message("alive")
@dataclass(frozen=True, kw_only=True)
class Alive:
    """Sent about once a second, with an empty request id, to connections with requests in flight."""


REQUESTS = {cls.type: cls for cls in (Hello, Generate, Cancel, Stats, Health, Drain)}
REPLIES = {
    cls.type: cls
    for cls in (ServerInfo, Queued, Delta, Done, Error, CancelReply, StatsReply, HealthReply, Drained, Alive)
}
STREAMED = (Queued, Delta)  # replies after which more follow
