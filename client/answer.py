"""Collects the replies of a generate request into a completion."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from euryale.client import protocol
from euryale.client.errors import Cancelled, ProtocolError
from euryale.client.logprobs import Logprobs
from euryale.client.protocol import Delta, Done, Queued, SampleEnd, Usage
from euryale.client.session import Exchange

MAX_SAMPLES = 1024  # more than any server accepts


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One of the answers to a request, or the part of it that has arrived.

    ``finish_reason``: "stop", "length" or "cancelled", None while the answer is incomplete. ``stop``: the stop string
    or token id that ended it. ``tokens_per_step``: how many tokens each decoding step emitted. ``logprobs``: of the
    tokens, None if not requested. The end of one of several samples is known once all have ended.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    stop: str | int | None
    tokens_per_step: tuple[int, ...]
    logprobs: Logprobs | None


@dataclass(frozen=True, kw_only=True)
class Completion(Sample):
    """The answer to a request, or the part of it that has arrived.

    ``usage`` is None until the end. ``samples`` are all answers of a request with ``n`` > 1; this is the first of them.
    ``prompt_logprobs``: of the prompt from its second token on, None if not requested. ``seed`` and ``fingerprint``
    identify how the answer can be reproduced.
    """

    usage: Usage | None
    prompt_tokens: tuple[int, ...]
    seed: int | None
    fingerprint: str | None
    samples: tuple[Sample, ...]
    prompt_logprobs: Logprobs | None


class _Pieces:
    """Collects the deltas of one sample."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._steps: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[Logprobs] = []

    def add(self, delta: Delta) -> None:
        """Appends a delta."""
        self.tokens += delta.tokens
        self._steps += delta.tokens_per_step
        self._texts.append(delta.text)
        if delta.logprobs is not None:
            self._logprobs.append(delta.logprobs)

    def sample(self, end: Done | SampleEnd | None) -> Sample:
        """Returns the sample so far; ``end`` is None while it is incomplete."""
        return Sample(
            text="".join(self._texts),
            tokens=tuple(self.tokens),
            finish_reason=end.finish_reason if end else None,
            stop=end.stop if end else None,
            tokens_per_step=tuple(self._steps),
            logprobs=Logprobs.join(self._logprobs) if self._logprobs else None,
        )


class Answer:
    """Collects the replies of one generate request."""

    def __init__(self, exchange: Exchange, message: protocol.Generate) -> None:
        self.exchange = exchange
        self.queued: Queued | None = None
        self.done: Done | None = None
        self.closed = False
        count = message.params.get("n", 1)
        # The server refuses an invalid number of samples.
        self._pieces = [_Pieces() for _ in range(count if type(count) is int and 0 < count <= MAX_SAMPLES else 1)]
        self._prompt_logprobs: Logprobs | None = None

    def take(self, reply: Any) -> Delta | None:
        """Adds a reply and returns the delta for the caller, None if the reply has no new text or tokens.

        Raises Cancelled if the answer was cancelled, ProtocolError if the reply is out of order.
        """
        if isinstance(reply, Queued) and self.queued is None:
            self.queued = reply
            return None
        if isinstance(reply, Delta) and self._fits(reply):
            self._pieces[reply.sample_index].add(reply)
            if reply.prompt_logprobs is not None:
                self._prompt_logprobs = reply.prompt_logprobs
            return reply
        if isinstance(reply, Done) and (self.queued is not None or reply.finish_reason == "cancelled"):
            self.done = reply
            last = Delta(index=len(self._pieces[0].tokens), tokens=(), text=reply.text, tokens_per_step=())
            self._pieces[0].add(last)
            if reply.finish_reason == "cancelled":
                raise Cancelled("the request was cancelled", completion=self.completion())
            return last if reply.text else None
        raise ProtocolError(f"the server sent {reply.type} out of order")

    def completion(self) -> Completion:
        """Returns the answer so far."""
        done, queued = self.done, self.queued
        ends: Sequence[Done | SampleEnd | None] = (done.samples if done else None) or [done] * len(self._pieces)
        samples = tuple(pieces.sample(end) for pieces, end in zip(self._pieces, ends, strict=False))
        return Completion(
            **vars(samples[0]),
            usage=done.usage if done else None,
            prompt_tokens=queued.prompt_tokens if queued else (),
            seed=queued.seed if queued else None,
            fingerprint=queued.fingerprint if queued else None,
            samples=samples,
            prompt_logprobs=self._prompt_logprobs,
        )

    def _fits(self, delta: Delta) -> bool:
        """Returns whether the delta continues its sample."""
        if self.queued is None or not 0 <= delta.sample_index < len(self._pieces):
            return False
        return delta.index == len(self._pieces[delta.sample_index].tokens)
