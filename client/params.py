"""Types of the sampling parameters of ``Client.generate`` and what each must be; docs/protocol.md explains them."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from euryale.client.rules import BOOLEAN, Rule, either, is_text, is_whole, list_of, number, one_of, text, whole

ACCEPTANCE_RULES = ("exact", "typical")
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300  # entries, as OpenAI's interface allows; they travel with every step
MAX_SAMPLES = 128
MAX_SALT_LENGTH = 256
MOST_TOKENS = 2**31 - 1


class GenerateParams(TypedDict, total=False):
    """All parameters are optional; None means the server's default."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    min_tokens: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    prompt_logprobs: int | None
    n: int | None
    acceptance: Literal["exact", "typical"] | None
    epsilon: float | None
    delta: float | None
    speculation: bool | None
    priority: int | None
    latency_target: float | None
    cache_salt: str | None


def _is_bias(value: object) -> bool:
    if not isinstance(value, Mapping) or len(value) > MAX_LOGIT_BIAS:
        return False
    return all(_TOKEN_ID.fits(token) and _BIAS.fits(bias) for token, bias in value.items())


_TOKEN_ID = whole(0, MOST_TOKENS)
_BIAS = number(-100, 100)
_STOP = text(MAX_STOP_LENGTH, least=1)
_LOGPROBS = whole(0, MAX_LOGPROBS)
RULES: dict[str, Rule] = {
    "max_tokens": whole(1, MOST_TOKENS, "tokens"),
    "temperature": Rule("0 (greedy) or a number from 0.001 to 100", either(one_of(0, 0.0), number(1e-3, 100)).fits),
    "top_k": whole(0, MOST_TOKENS, "tokens"),
    "top_p": Rule("a number above 0 and at most 1", number(2**-149, 1).fits),  # above 0 in float32 too
    "min_p": number(0, 1),
    "seed": whole(0, 2**64 - 1),
    "stop": either(_STOP, list_of(_STOP, MAX_STOP_STRINGS)),
    "stop_token_ids": list_of(_TOKEN_ID, MAX_STOP_TOKENS),
    "ignore_eos": BOOLEAN,
    "min_tokens": whole(0, MOST_TOKENS, "tokens"),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 100),
    "logit_bias": Rule(f"a map from at most {MAX_LOGIT_BIAS} token ids to numbers from -100 to 100", _is_bias),
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "n": whole(1, MAX_SAMPLES, "samples"),
    "acceptance": one_of(*ACCEPTANCE_RULES),
    "epsilon": number(0, 1),
    "delta": number(0, 1),
    "speculation": BOOLEAN,
    "priority": whole(-(2**31), 2**31 - 1),
    "latency_target": number(0, 1e9, "milliseconds"),
    "cache_salt": text(MAX_SALT_LENGTH),
}

_MESSAGE = Rule(
    "a map of exactly the fields role and content, both strings of Unicode text",
    lambda v: isinstance(v, Mapping) and set(v) == {"role", "content"} and all(map(is_text, v.values())),
)
MAX_CHAT_MESSAGES = 1024
PROMPT_RULES: dict[str, Rule] = {
    "prompt": text(),
    "prompt_tokens": Rule(
        "a list of token ids, whole numbers of 32 bits",
        lambda v: isinstance(v, list | tuple) and all(is_whole(t) and abs(t) < 2**31 for t in v),
    ),
    "messages": list_of(_MESSAGE, MAX_CHAT_MESSAGES, least=1),
}


def check_params(values: Mapping[str, object]) -> None:
    """Raises ValueError, naming what was given and what is right, for an unknown parameter or a wrong value."""
    for name, value in values.items():
        if name not in RULES:
            raise ValueError(f"unknown sampling parameter {name[:40]!r}: use one of {', '.join(sorted(RULES))}")
        RULES[name].check(name, value)
