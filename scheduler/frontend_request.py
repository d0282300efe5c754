"""One request between the front end and its client: what is checked before, and what is made of its tokens after."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from euryale.client import protocol
from euryale.scheduler.detokenizer import Detokenizer, StopMatcher
from euryale.scheduler.params import PARAMETER_NAMES, SamplingParams

MAX_STOP_TOKENS = 256


class RequestError(Exception):
    """A request that is refused, with the error its client gets."""

    def __init__(self, code: str, text: str, *, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.reply = protocol.Error(code=code, message=text, retry_after=retry_after)


def _refuse(text: str) -> RequestError:
    return RequestError("invalid_request", text if len(text) <= 500 else f"{text[:500]}...")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the model and its memory allow one request. ``defaults`` are SamplingParams fields."""

    max_tokens: int  # prompt and answer together
    vocab_size: int
    max_characters_per_token: int
    defaults: dict[str, Any]


def read_prompt(request: protocol.Generate, tokenizer: Any, limits: Limits) -> Sequence[int]:
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


def _check_tokens(what: str, tokens: Sequence[int], limits: Limits) -> None:
    wrong = next((token for token in tokens if not 0 <= token < limits.vocab_size), None)
    if wrong is not None:
        raise _refuse(f"{what} contains token id {wrong}; this model's ids are 0 to {limits.vocab_size - 1}")


def read_params(given: dict[str, Any], prompt_length: int, limits: Limits) -> SamplingParams:
    """The sampling parameters, defaults filled in. Raises RequestError naming what does not fit and the remedy."""
    unknown = sorted(set(given) - PARAMETER_NAMES)
    if unknown:
        names = ", ".join(repr(name[:40]) for name in unknown[:5])
        raise _refuse(f"unknown sampling parameter {names}; known are {', '.join(sorted(PARAMETER_NAMES))}")
    room = limits.max_tokens - prompt_length
    values = {**limits.defaults, **{name: value for name, value in given.items() if value is not None}}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
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
    return params


class OpenRequest:
    """A request the engine works on: turns its tokens into deltas and knows when its client has had its last one.

    ``closed`` is set with the client's final message. The engine may still hold the request then.
    """

    def __init__(
        self,
        *,
        key: int,
        client: bytes,
        request_id: bytes,
        prompt: Sequence[int],
        params: SamplingParams,
        tokenizer: Any,
    ) -> None:
        self.key = key
        self.client = client
        self.request_id = request_id
        self.closed = False
        self.num_tokens = 0
        self._prompt_length = len(prompt)
        self._num_steps = 0
        self._stepwise = bool(params.stop)
        self._detokenizer = Detokenizer(tokenizer, context=prompt)
        self._matcher = StopMatcher(params.stop)
        self._new_tokens: list[int] = []
        self._new_steps: list[int] = []
        self._new_text = ""

    def take(self, tokens: Sequence[int], finish_reason: str | None) -> protocol.Done | None:
        """Notes what a step gave. The final message, to be sent after ``take_delta``, if that ends the answer.

        With stop strings tokens are read one by one, and those after the string are dropped: so the answer does not
        depend on how many tokens a step happened to accept.
        """
        stop: str | int | None = None
        count = 0
        for piece in ([token] for token in tokens) if self._stepwise else ([tokens] if tokens else ()):
            count += len(piece)
            text, stop = self._matcher.push(self._detokenizer.push(piece))
            self._new_text += text
            if stop is not None:
                break
        if count:
            self._new_tokens += tokens[:count]
            self._new_steps.append(count)
            self._num_steps += 1
            self.num_tokens += count
        if stop is not None:
            return self._close("stop", "", stop)
        if finish_reason is None:
            return None
        tail, stop = self._matcher.push(self._detokenizer.finish())
        if stop is not None:
            return self._close("stop", tail, stop)
        tail += self._matcher.finish()
        return self._close(finish_reason, tail, tokens[-1] if finish_reason == "stop" and tokens else None)

    def cancel(self) -> protocol.Done:
        """The final message of an answer that is cut off here."""
        return self._close("cancelled", "", None)

    def take_delta(self) -> protocol.Delta | None:
        """What is new since the last call."""
        if not self._new_tokens and not self._new_text:
            return None
        delta = protocol.Delta(
            index=self.num_tokens - len(self._new_tokens),
            tokens=tuple(self._new_tokens),
            text=self._new_text,
            accepted=tuple(self._new_steps),
        )
        self._new_tokens, self._new_steps, self._new_text = [], [], ""
        return delta

    def _close(self, finish_reason: str, tail: str, stop: str | int | None) -> protocol.Done:
        self.closed = True
        usage = protocol.Usage(
            prompt_tokens=self._prompt_length, output_tokens=self.num_tokens, decode_steps=self._num_steps
        )
        return protocol.Done(finish_reason=finish_reason, text=tail, usage=usage, stop=stop)
