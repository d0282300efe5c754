"""What a generate request brought: its replies put together."""

from dataclasses import dataclass
from typing import Any

from euryale.client import protocol
from euryale.client.errors import Cancelled, ProtocolError
from euryale.client.logprobs import Logprobs
from euryale.client.protocol import Delta, Done, Queued, SampleEnd, Usage
from euryale.client.session import Exchange

MAX_SAMPLES = 1024  # no server takes more


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One of the answers to a request, or what arrived of it.

    ``finish_reason`` is stop, length or cancelled, None while it runs; ``stop`` the stop string or token id that ended
    it; ``accepted`` the number of tokens that each decoding step gave; ``logprobs`` of the tokens, None unless asked
    for. The end of one of several samples is known when all have ended.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    stop: str | int | None
    tokens_per_step: tuple[int, ...]
    logprobs: Logprobs | None


@dataclass(frozen=True, kw_only=True)
class Completion(Sample):
    """A whole answer, or what arrived of it.

    ``usage`` is None until the end. ``samples`` are all answers of a request for several, of which the first is this
    one. ``prompt_logprobs`` of the prompt's tokens but the first, None unless asked for.
    """

    usage: Usage | None
    prompt_tokens: tuple[int, ...]
    seed: int | None
    fingerprint: str | None
    samples: tuple[Sample, ...]
    prompt_logprobs: Logprobs | None


class _Pieces:
    """The deltas of one sample."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._steps: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[Logprobs] = []

    def add(self, delta: Delta) -> None:
        self.tokens += delta.tokens
        self._steps += delta.tokens_per_step
        self._texts.append(delta.text)
        if delta.logprobs is not None:
            self._logprobs.append(delta.logprobs)

    def sample(self, end: Done | SampleEnd | None) -> Sample:
        return Sample(
            text="".join(self._texts),
            tokens=tuple(self.tokens),
            finish_reason=end and end.finish_reason,
            stop=end and end.stop,
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
        # What is no number of samples is the server's to refuse.
        self._pieces = [_Pieces() for _ in range(count if type(count) is int and 0 < count <= MAX_SAMPLES else 1)]
        self._prompt_logprobs: Logprobs | None = None

    def take(self, reply: Any) -> Delta | None:
        """Notes a reply; a delta for the caller, or None if there is nothing to show.

        Raises Cancelled if the answer ended by cancellation, ProtocolError if the reply is out of order.
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
        """What is known by now."""
        done, queued = self.done, self.queued
        ends = (done and done.samples) or [done] * len(self._pieces)
        samples = tuple(pieces.sample(end) for pieces, end in zip(self._pieces, ends, strict=False))
        return Completion(
            **vars(samples[0]),
            usage=done and done.usage,
            prompt_tokens=queued.prompt_tokens if queued else (),
            seed=queued and queued.seed,
            fingerprint=queued and queued.fingerprint,
            samples=samples,
            prompt_logprobs=self._prompt_logprobs,
        )

    def _fits(self, delta: Delta) -> bool:
        """Whether the delta comes next."""
        if self.queued is None or not 0 <= delta.sample_index < len(self._pieces):
            return False
        return delta.index == len(self._pieces[delta.sample_index].tokens)
