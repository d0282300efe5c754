"""The state of one request in the scheduler."""

import enum
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from euryale.scheduler.logits_inputs import History, LogitsInputs, inputs_of_rows, targets_of_rows
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_result import HeadCandidates, RequestOutput, TokenLogprobs


class FinishReason(enum.StrEnum):
    """Why an output ended."""

    STOP = "stop"  # end-of-sequence token, stop token id or stop string
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"


@dataclass(eq=False, kw_only=True)
class Request:
    """One request: ``prompt`` int32 [T], parameters, output and pages.

    *Known* tokens are the prompt and the output so far. *Computed* tokens are those whose K/V are committed to pages.
    Scheduling lets computed tokens catch up with known ones, draft tokens included. ``sample_index`` distinguishes
    independent answers to one prompt with one seed.
    """

    key: int
    prompt: np.ndarray
    params: SamplingParams
    sample_index: int = 0
    output: list[int] = field(default_factory=list)
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    page_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))  # int32, zeros for later ones
    page_hashes: list[bytes] = field(default_factory=list)  # of the full pages of known tokens, as far as computed
    num_cached_pages: int = 0  # leading pages that are in the prefix cache
    head_candidates: HeadCandidates | None = None  # None: the heads did not run
    drafter_state: object | None = None  # owned by the drafter
    tokens_per_step: list[int] = field(default_factory=list)  # tokens emitted by each decoding step
    finish_reason: FinishReason | None = None
    num_preempted: int = 0  # how often it was preempted
    num_lost: int = 0  # computed tokens when it was last preempted
    arrival: int = 0  # number in the order of arrival, from 0
    num_waited: int = 0  # steps spent waiting, after preemptions too
    aged_since: int | None = None  # the step from which no request may overtake it
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt from its second token on

    @property
    def num_known(self) -> int:
        """Tokens of the prompt and of the output so far."""
        return len(self.prompt) + len(self.output)

    @property
    def num_uncomputed(self) -> int:
        """Known tokens whose K/V are not in pages yet."""
        return self.num_known - self.num_computed

    @property
    def num_remaining(self) -> int:
        """Output tokens still allowed."""
        return self.params.max_tokens - len(self.output)

    @property
    def is_protected(self) -> bool:
        """Whether it is exempt from preemption; such a request holds all pages it can need while it runs."""
        return self.num_preempted > 0 and self.aged_since is not None

    @property
    def num_scored(self) -> int:
        """Prompt tokens whose log-probabilities are known; the first token has none."""
        return sum(map(len, self.prompt_logprobs))

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be computed."""
        return self.params.prompt_logprobs is not None and self.num_scored < len(self.prompt) - 1

    def logits_inputs(self, num_new_tokens: int, emits_tokens: bool, end_ids: frozenset[int]) -> LogitsInputs | None:
        """Return the logits inputs of a segment with ``num_new_tokens`` rows of known tokens; None if it needs none.

        ``emits_tokens``: the step draws tokens for the request."""
        fields: dict[str, Any] = (
            inputs_of_rows(self.params, self._history, self.output, end_ids) if emits_tokens else {}
        )
        if self.wants_prompt_logprobs:
            fields |= targets_of_rows(self.prompt, self.num_computed, num_new_tokens, self.num_scored)
            fields["prompt_logprobs"] = self.params.prompt_logprobs
        inputs = LogitsInputs(**fields)
        return inputs if inputs.changes_logits or inputs.logprobs >= 0 or len(inputs.targets) else None

    def output_of(self, taken: list[int], logprobs: TokenLogprobs | None) -> RequestOutput:
        """Return what the client gets for the tokens that ``append`` has just ``taken``.

        ``logprobs`` are those of the step, of which the taken tokens' part is passed on. Prompt logprobs come with the
        first output tokens."""
        is_first = self.params.prompt_logprobs is not None and len(self.output) == len(taken)
        return RequestOutput(
            key=self.key,
            tokens=taken,
            finish_reason=self.finish_reason,
            logprobs=None if logprobs is None else logprobs[: len(taken)],
            prompt_logprobs=TokenLogprobs.join(self.prompt_logprobs) if is_first else None,
        )

    @cached_property
    def _history(self) -> History:
        return History(self.prompt if self.params.repetition_penalty != 1 else self.prompt[:0])

    def known_tokens(self, start: int, stop: int) -> np.ndarray:
        """Return known tokens ``start`` to ``stop`` - 1, int32."""
        split = len(self.prompt)
        if start >= split:
            return np.array(self.output[start - split : stop - split], dtype=np.int32)
        head = self.prompt[start : min(stop, split)]
        tail = self.output[max(start - split, 0) : max(stop - split, 0)]
        return np.concatenate([head, np.asarray(tail, dtype=np.int32)]) if tail else head

    def last_tokens(self, count: int) -> list[int]:
        """Return the last ``count`` known tokens, latest first, padded with -1."""
        tokens = self.output[: -count - 1 : -1]
        if len(tokens) < count:
            tokens = tokens + self.prompt[: -(count - len(tokens)) - 1 : -1].tolist()
        return tokens + [-1] * (count - len(tokens))

    def append(self, tokens: list[int], end_ids: frozenset[int]) -> list[int]:
        """Append the tokens that a step emitted, up to the first that ends the output; return the tokens taken.

        An accepted path may go on after an end token or beyond ``max_tokens``; those tokens are dropped. Sets
        ``finish_reason`` if the output ended.
        """
        stops = frozenset(self.params.stop_token_ids)
        if not self.params.ignore_eos:
            stops |= end_ids
        taken = []
        for token in tokens:
            taken.append(token)
            if token in stops:
                self.finish_reason = FinishReason.STOP
            elif len(self.output) + len(taken) >= self.params.max_tokens:
                self.finish_reason = FinishReason.LENGTH
            if self.finish_reason:
                break
        self.output.extend(taken)
        return taken
