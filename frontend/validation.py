"""What is checked of a request before the engine hears of it."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from euryale.client import protocol
from euryale.scheduler.sampling_params import PARAMETER_NAMES, SamplingParams

MAX_STOP_TOKENS = 256


class RequestError(Exception):
    """A request that is refused, with the error its client gets."""

    def __init__(self, code: str, text: str, *, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.reply = protocol.Error(code=code, message=text, retry_after=retry_after)


def _refuse(text: str) -> RequestError:
    return RequestError("invalid_request", text if len(text) <= 500 else f"{text[:500]}...")


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What the model and its memory allow one request. ``defaults`` are SamplingParams fields."""

    max_tokens: int  # prompt and answer together
    vocab_size: int
    max_characters_per_token: int
    defaults: dict[str, Any]


def read_prompt(request: protocol.Generate, tokenizer: Any, limits: RequestLimits) -> Sequence[int]:
    """The prompt's token ids. Raises RequestError if the request has none that this model can take."""
    given = [name for name in ("prompt", "prompt_tokens", "messages") if getattr(request, name) is not None]
    if len(given) != 1:
        raise _refuse(f"give exactly one of prompt, prompt_tokens and messages, not {len(given)} of them")
    characters = len(request.prompt or "") + sum(len(item["content"]) for item in request.messages or ())
    if characters > limits.max_tokens * limits.max_characters_per_token:
        raise _refuse(f"a prompt of {characters} characters cannot fit into the model's {limits.max_tokens} tokens")
    if request.messages is not None:
        tokens = _read_chat(request.messages, tokenizer)
    elif request.prompt is not None:
        tokens = tokenizer.encode(request.prompt) if request.prompt else ()
    else:
        tokens = request.prompt_tokens
    if not len(tokens):
        raise _refuse("the prompt is empty; a model needs at least one token to continue")
    _check_tokens("prompt", tokens, limits)
    if len(tokens) >= limits.max_tokens:
        raise _refuse(
            f"the prompt has {len(tokens)} tokens and leaves no room for an answer; prompt and answer together may "
            f"have {limits.max_tokens}: shorten the prompt to {limits.max_tokens - 1} or fewer"
        )
    return tokens


def _read_chat(messages: Sequence[dict[str, str]], tokenizer: Any) -> Sequence[int]:
    if not tokenizer.chat_template:
        raise _refuse("this model's tokenizer has no chat template: send the whole text as prompt")
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # templates raise whatever they like, for example about the order of roles
        raise _refuse(f"the model's chat template refuses these messages: {error}") from None


def _check_tokens(what: str, tokens: Sequence[int], limits: RequestLimits) -> None:
    wrong = next((token for token in tokens if not 0 <= token < limits.vocab_size), None)
    if wrong is not None:
        raise _refuse(f"{what} contains token id {wrong}; this model's ids are 0 to {limits.vocab_size - 1}")


def read_params(given: dict[str, Any], prompt_length: int, limits: RequestLimits) -> SamplingParams:
    """The sampling parameters, defaults filled in. Raises RequestError naming what does not fit and the remedy."""
    unknown = sorted(set(given) - PARAMETER_NAMES)
    if unknown:
        names = ", ".join(repr(name[:40]) for name in unknown[:5])
        raise _refuse(f"unknown sampling parameter {names}; known are {', '.join(sorted(PARAMETER_NAMES))}")
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
    if len(params.stop_token_ids) > MAX_STOP_TOKENS:
        raise _refuse(f"stop_token_ids takes at most {MAX_STOP_TOKENS} ids, not {len(params.stop_token_ids)}")
    _check_tokens("stop_token_ids", params.stop_token_ids, limits)
    _check_tokens("logit_bias", [token for token, _ in params.logit_bias], limits)
    return params


def _read_bias(given: dict[Any, Any]) -> Iterator[tuple[int, Any]]:
    """Pairs of a token id and its bias; the ids of a msgpack map are strings."""
    for key, bias in given.items():
        if not isinstance(key, str) or not key.isascii() or not key.isdecimal() or len(key) > 10:
            raise _refuse(f"logit_bias maps token ids, written as strings such as '42', to numbers; not {key!r:.40}")
        yield int(key), bias
