"""One request as the scheduler sees it."""

import enum
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from euryale.scheduler.logits_inputs import History, LogitsInputs, inputs_of_rows, targets_of_rows
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_result import HeadCandidates, RequestOutput, TokenLogprobs


class FinishReason(enum.StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # end-of-sequence token, stop token id or stop string
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"


@dataclass(eq=False, kw_only=True)
class Request:
    """``prompt`` int32 [length]. *Known* tokens are the prompt and the answer so far; *computed* tokens are those
    whose K/V are committed to pages. Scheduling means letting computed catch up with known, drafts included. ``sample``
    tells independent answers to one prompt with one seed apart."""

    key: int
    prompt: np.ndarray
    params: SamplingParams
    sample_index: int = 0
    output: list[int] = field(default_factory=list)
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    page_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))  # the same, int32
    page_hashes: list[bytes] = field(default_factory=list)  # of the full pages of the known tokens, as far as made
    num_cached_pages: int = 0  # of the page names, those by which others can find the pages
    head_candidates: HeadCandidates | None = None  # None: the heads did not run
    drafter_state: object | None = None  # what the drafter keeps of it
    tokens_per_step: list[int] = field(default_factory=list)  # tokens emitted by each decoding step
    finish_reason: FinishReason | None = None
    num_preempted: int = 0  # how often it had to give its pages back
    num_lost: int = 0  # tokens that were computed when it last did
    arrival: int = 0  # place among all requests that ever came
    num_waited: int = 0  # steps before it ran, and after every preemption
    aged_since: int | None = None  # the step from which nobody may pass it
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt's tokens but the first, in parts

    @property
    def num_known(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def num_uncomputed(self) -> int:
        return self.num_known - self.num_computed

    @property
    def remaining(self) -> int:
        """Output tokens still allowed."""
        return self.params.max_tokens - len(self.output)

    @property
    def is_protected(self) -> bool:
        """Whether nobody may preempt it again; it holds all the pages it can need while it runs."""
        return self.num_preempted > 0 and self.aged_since is not None

    @property
    def num_scored(self) -> int:
        """Tokens of the prompt whose log-probabilities are known; the first one has none."""
        return sum(map(len, self.prompt_logprobs))

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether rows of the prompt have to be computed for what they say, not only for their K/V."""
        return self.params.prompt_logprobs is not None and self.num_scored < len(self.prompt) - 1

    def logits_inputs(self, num_new_tokens: int, emits_tokens: bool, end_ids: frozenset[int]) -> LogitsInputs | None:
        """What a step with so many rows of known tokens has to know beyond the parameters, None if that is nothing;
        ``emits_tokens``: it draws tokens."""
        fields: dict = inputs_of_rows(self.params, self._history, self.output, end_ids) if emits_tokens else {}
        if self.wants_prompt_logprobs:
            fields |= targets_of_rows(self.prompt, self.num_computed, num_new_tokens, self.num_scored)
            fields["prompt_logprobs"] = self.params.prompt_logprobs
        logits_inputs = LogitsInputs(**fields)
        return (
            logits_inputs
            if logits_inputs.changes_logits or logits_inputs.logprobs >= 0 or len(logits_inputs.targets)
            else None
        )

    def output_of(self, taken: list[int], logprobs: TokenLogprobs | None) -> RequestOutput:
        """Return the output with the tokens just ``taken``: their part of a step's ``logprobs``, and the prompt's with
        the first of them, each if it was asked for."""
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
        """Known tokens ``start`` to ``stop``, int32."""
        split = len(self.prompt)
        if start >= split:
            return np.array(self.output[start - split : stop - split], dtype=np.int32)
        head = self.prompt[start : min(stop, split)]
        tail = self.output[max(start - split, 0) : max(stop - split, 0)]
        return np.concatenate([head, np.asarray(tail, dtype=np.int32)]) if tail else head

    def last_tokens(self, count: int) -> list[int]:
        """The last ``count`` known tokens, the latest first, -1 where there is none."""
        found = self.output[: -count - 1 : -1]
        if len(found) < count:
            found = found + self.prompt[: -(count - len(found)) - 1 : -1].tolist()
        return found + [-1] * (count - len(found))

    def append(self, tokens: list[int], end_ids: frozenset[int]) -> list[int]:
        """Take what a step emitted, up to the first token that ends the answer; returns the tokens taken.

        Tokens after an end token or after ``max_tokens``, which an accepted path may hold, are not part of
        the answer.
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
