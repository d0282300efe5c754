"""Checks and reads a request before it is passed to the engine."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from euryale.client import protocol
from euryale.client.params import RULES
from euryale.client.rules import shown
from euryale.scheduler.sampling_params import SamplingParams

MAX_STOP_TOKENS = 256
# Tokens of a longer text are first counted in pieces, so that one with too many is refused early.
MAX_UNCOUNTED_BYTES = 1 << 19
MAX_UNCOUNTED_BYTES_PER_TOKEN = 8  # times the tokens that a request may have; the smaller bound counts
PIECE_CHARACTERS = 1 << 16
CUT_TOKENS = 64  # upper bound of the tokens that a cut between two pieces adds
CHAT_MESSAGE_CHARACTERS = 128  # characters that take as long to tokenize as the template takes for a message


class RequestError(Exception):
    """A refused request. ``reply``: the error that its client gets."""

    def __init__(self, code: str, text: str, *, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.reply = protocol.Error(code=code, message=text, retry_after=retry_after)


def _refuse(text: str) -> RequestError:
    return RequestError("invalid_request", text if len(text) <= 500 else f"{text[:500]}...")


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What the model and its KV cache allow for one request. ``defaults``: SamplingParams fields by name."""

    max_tokens: int  # prompt and answer together
    vocab_size: int
    defaults: dict[str, Any]


def check_prompt(request: protocol.Generate) -> int:
    """Return the cost of tokenizing a request, in characters of text.

    Raises RequestError if the request does not have exactly one prompt.
    """
    given = [name for name in ("prompt", "prompt_tokens", "messages") if getattr(request, name) is not None]
    if len(given) != 1:
        raise _refuse(f"give exactly one of prompt, prompt_tokens and messages, not {len(given)} of them")
    characters = sum(len(item["role"]) + len(item["content"]) for item in request.messages or ())
    return len(request.prompt or "") + characters + CHAT_MESSAGE_CHARACTERS * len(request.messages or ())


def read_prompt(request: protocol.Generate, tokenizer: Any, limits: RequestLimits) -> np.ndarray:
    """Return the prompt's token ids, int32 [length]. Raises RequestError if they exceed the limits.

    Safe to call from any thread. Tokenizing does not block other threads.
    """
    tokens: Sequence[int] | np.ndarray
    if request.messages is not None:
        tokens = _tokenize(_render_chat(request.messages, tokenizer), tokenizer, limits, add_special_tokens=False)
    elif request.prompt is not None:
        tokens = _tokenize(request.prompt, tokenizer, limits, add_special_tokens=True) if request.prompt else ()
    else:
        tokens = np.frombuffer(request.prompt_tokens or b"", dtype="<i4")
    if not len(tokens):
        raise _refuse("the prompt is empty; a model needs at least one token to continue")
    if len(tokens) >= limits.max_tokens:
        raise _no_room(f"{len(tokens)}", limits)
    prompt = np.asarray(tokens, dtype=np.int32)
    _check_tokens("prompt", prompt, limits)
    return prompt


def _no_room(count: str, limits: RequestLimits) -> RequestError:
    return _refuse(
        f"the prompt has {count} tokens and leaves no room for an answer; prompt and answer together may "
        f"have {limits.max_tokens}: shorten the prompt to {limits.max_tokens - 1} or fewer"
    )


def _tokenize(text: str, tokenizer: Any, limits: RequestLimits, *, add_special_tokens: bool) -> list[int]:
    """Return the text's token ids. Raises RequestError for too many, if possible without tokenizing all of the text.

    The pieces of a long text only serve to count, because a cut may divide a token.
    """
    most = min(MAX_UNCOUNTED_BYTES, MAX_UNCOUNTED_BYTES_PER_TOKEN * limits.max_tokens)
    if len(text) > most or len(text.encode()) > most:
        count = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            count += len(tokenizer.encode(piece, add_special_tokens=False)) - CUT_TOKENS
            if count >= limits.max_tokens:
                raise _no_room(f"more than {count}", limits)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return tokens


def _render_chat(messages: Sequence[dict[str, str]], tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise _refuse("this model's tokenizer has no chat template: send the whole text as prompt")
    try:
        text: str = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates may raise anything, for example about the order of roles
        raise _refuse(f"the model's chat template refuses these messages: {error}") from None
    return text


def _check_tokens(what: str, tokens: Sequence[int] | np.ndarray, limits: RequestLimits) -> None:
    ids = np.asarray(tokens, dtype=np.int64)
    wrong = ids[(ids < 0) | (ids >= limits.vocab_size)]
    if len(wrong):
        raise _refuse(f"{what} contains token id {wrong[0]}; this model's ids are 0 to {limits.vocab_size - 1}")


def read_params(given: dict[str, Any], prompt_length: int, limits: RequestLimits) -> SamplingParams:
    """Return the sampling parameters with defaults filled in.

    Raises RequestError, naming the parameter and the remedy, for a value that is malformed or exceeds the limits.
    """
    unknown = sorted(set(given) - RULES.keys())
    if unknown:
        names = ", ".join(repr(name[:40]) for name in unknown[:5])
        raise _refuse(f"unknown sampling parameter {names}: use one of {', '.join(sorted(RULES))}")
    room = limits.max_tokens - prompt_length
    values = {**limits.defaults, **{name: value for name, value in given.items() if value is not None}}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if isinstance(values.get("logit_bias"), dict):
        values["logit_bias"] = tuple(_read_bias(values["logit_bias"]))
    if isinstance(values.get("stop"), str):
        values["stop"] = (values["stop"],)
    if given.get("max_tokens") is None:
        values["max_tokens"] = min(values.get("max_tokens", SamplingParams.max_tokens), room)
    if given.get("seed") is None:
        values["seed"] = secrets.randbits(64)
    try:
        params = SamplingParams(**values)
    except ValueError as error:
        raise _refuse(str(error)) from None
    if params.max_tokens > room:
        raise _refuse(
            f"max_tokens {params.max_tokens} and a prompt of {prompt_length} tokens exceed the {limits.max_tokens} "
            f"that one request may have: use max_tokens {room} or less, or a shorter prompt"
        )
    _check_tokens("stop_token_ids", params.stop_token_ids, limits)
    _check_tokens("logit_bias", [token for token, _ in params.logit_bias], limits)
    return params


def _read_bias(given: dict[Any, Any]) -> Iterator[tuple[int, Any]]:
    """Yield pairs of token id and bias. The keys of the map are strings, as in JSON."""
    for key, bias in given.items():
        if not isinstance(key, str) or not key.isascii() or not key.isdecimal() or len(key) > 10:
            raise _refuse(f"logit_bias maps token ids, written as strings such as '42', to numbers; not {shown(key)}")
        yield int(key), bias
