"""Turns a request's output tokens into the deltas of its samples, their ends and the final message."""

from collections.abc import Sequence

import numpy as np

from euryale.client import protocol
from euryale.client.logprobs import Logprobs
from euryale.frontend.detokenizer import Detokenizer, StopMatcher, TokenBytes
from euryale.frontend.messages import pack_logprobs
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_result import RequestOutput, TokenLogprobs

CONTEXT_TOKENS = 64  # last tokens of the prompt that the detokenizer sees


class OpenSample:
    """One sample of a request; turns its tokens into deltas.

    ``end`` is set when the sample is complete, although the engine, which knows it by ``key``, may still hold it.
    ``tail``: last text of a request's only sample, which its final message carries. With several samples each one's
    last delta carries it.
    """

    def __init__(
        self, *, key: int, index: int, context: list[int], params: SamplingParams, token_bytes: TokenBytes
    ) -> None:
        self.key = key
        self.index = index
        self.params = params
        self.end: protocol.SampleEnd | None = None
        self.tail = ""
        self.num_tokens = self.num_steps = 0
        self._detokenizer = Detokenizer(token_bytes, context=context)
        self._matcher = StopMatcher(params.stop)
        self._new_tokens: list[int] = []
        self._new_steps: list[int] = []
        self._new_text = ""
        self._new_logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: TokenLogprobs | None = None

    def take(self, output: RequestOutput) -> None:
        """Record a step's output.

        With stop strings, tokens are read one by one and those after the string are dropped. So the answer does not
        depend on how many tokens a step accepted.
        """
        tokens, reason = output.tokens, output.finish_reason
        stop: str | int | None = None
        count = 0
        for piece in ([token] for token in tokens) if self.params.stop else ([tokens] if tokens else ()):
            count += len(piece)
            text, stop = self._matcher.push(self._detokenizer.push(piece))
            self._new_text += text
            if stop is not None:
                break
        if count:
            self._note(output, count)
        if stop is not None:
            self._close("stop", "", stop)
        elif reason is not None:
            tail, stop = self._matcher.push(self._detokenizer.finish())
            if stop is not None:
                self._close("stop", tail, stop)
            else:
                last = tokens[-1] if reason == "stop" and tokens else None
                self._close(reason, tail + self._matcher.finish(), last)

    def cancel(self) -> None:
        """End the sample here, unless it is complete."""
        if self.end is None:
            self._close("cancelled", "", None)

    def take_delta(self) -> protocol.Delta | None:
        """Return the output recorded since the last call; None if there is none."""
        if not self._new_tokens and not self._new_text:
            return None
        delta = protocol.Delta(
            index=self.num_tokens - len(self._new_tokens),
            tokens=tuple(self._new_tokens),
            text=self._new_text,
            tokens_per_step=tuple(self._new_steps),
            sample_index=self.index,
            logprobs=_packed(TokenLogprobs.join(self._new_logprobs) if self._new_logprobs else None),
            prompt_logprobs=_packed(self._prompt_logprobs),
        )
        self._new_tokens, self._new_steps, self._new_text = [], [], ""
        self._new_logprobs, self._prompt_logprobs = [], None
        return delta

    def _note(self, output: RequestOutput, count: int) -> None:
        """Record the first ``count`` tokens of a step for the next delta."""
        self._new_tokens += output.tokens[:count]
        self._new_steps.append(count)
        self.num_steps += 1
        self.num_tokens += count
        if output.logprobs is not None:
            self._new_logprobs.append(output.logprobs[:count])
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs

    def _close(self, finish_reason: str, tail: str, stop: str | int | None) -> None:
        if self.params.n == 1:
            self.tail = tail
        else:
            self._new_text += tail
        self.end = protocol.SampleEnd(
            finish_reason=finish_reason, stop=stop, output_tokens=self.num_tokens, decode_steps=self.num_steps
        )


class OpenRequest:
    """A request with one sample for each of ``keys``. ``prompt`` int32 [length].

    ``closed``: the client got its final message or is gone.
    """

    def __init__(
        self,
        *,
        keys: Sequence[int],
        client: bytes,
        request_id: bytes,
        prompt: np.ndarray,
        params: SamplingParams,
        token_bytes: TokenBytes,
    ) -> None:
        self.client = client
        self.request_id = request_id
        self.closed = False
        context = prompt[-CONTEXT_TOKENS:].tolist()
        self.samples = [
            OpenSample(key=key, index=index, context=context, params=params, token_bytes=token_bytes)
            for index, key in enumerate(keys)
        ]
        self._prompt_length = len(prompt)

    @property
    def has_ended(self) -> bool:
        """Whether all samples are complete."""
        return all(sample.end is not None for sample in self.samples)

    def cancel(self) -> protocol.Done:
        """End all samples here and return the final message."""
        for sample in self.samples:
            sample.cancel()
        return self.done()

    def done(self) -> protocol.Done:
        """Return the final message of a request that has ended, to be sent after the last deltas."""
        ends = tuple(sample.end for sample in self.samples if sample.end is not None)
        first = ends[0]
        is_cancelled = any(end.finish_reason == "cancelled" for end in ends)
        usage = protocol.Usage(
            prompt_tokens=self._prompt_length,
            output_tokens=sum(end.output_tokens for end in ends),
            decode_steps=sum(end.decode_steps for end in ends),
        )
        return protocol.Done(
            finish_reason="cancelled" if is_cancelled else first.finish_reason,
            text=self.samples[0].tail,
            usage=usage,
            stop=first.stop,
            samples=ends if len(ends) > 1 else None,
        )


def _packed(logprobs: TokenLogprobs | None) -> Logprobs | None:
    """Return log-probabilities in the client's format."""
    return None if logprobs is None else Logprobs(*pack_logprobs(logprobs))
