"""What a plan says of a request that asks for more than tokens of the model's own distribution.

Most requests have none of this and pay nothing for it. It travels as int32 words in the plan, so that ranks keep no
history themselves. This file does not know what is computed from it (``runtime/sampling/logits_processors.py``,
``logprobs.py``).
"""

from dataclasses import dataclass, field

import numpy as np

from euryale.scheduler.sampling_params import SamplingParams


def _no_ids() -> np.ndarray:
    return np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class LogitsInputs:
    """Of the rows from which tokens are drawn: the penalties ``repetition``, ``frequency`` and ``presence``;
    ``history`` int32 [2, H], distinct tokens and how often the answer has each (0: only the prompt has it), without the
    drafts of this step; ``bias_ids`` int32 [B] and ``bias`` float32 [B]; ``ends`` int32 [E], not to be drawn where
    fewer than ``min_tokens`` output tokens precede; ``logprobs``, how many likeliest tokens are reported (-1: none, nor
    the chosen one).

    Of the rows of known tokens: ``targets`` int32 [T], the prompt tokens that follow the rows from ``first_target`` on,
    whose log-probabilities are reported with the ``prompt_logprobs`` likeliest.
    """

    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    history: np.ndarray = field(default_factory=lambda: np.zeros((2, 0), dtype=np.int32))
    bias_ids: np.ndarray = field(default_factory=_no_ids)
    bias: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    min_tokens: int = 0
    ends: np.ndarray = field(default_factory=_no_ids)
    logprobs: int = -1
    prompt_logprobs: int = -1
    first_target: int = 0
    targets: np.ndarray = field(default_factory=_no_ids)

    @property
    def has_penalties(self) -> bool:
        return self.repetition != 1 or self.frequency != 0 or self.presence != 0

    @property
    def changes_logits(self) -> bool:
        return self.has_penalties or len(self.bias_ids) > 0 or len(self.ends) > 0


class History:
    """How often an answer has each token, kept up as it grows."""

    def __init__(self, prompt: np.ndarray) -> None:
        """``prompt``: tokens that count as seen, but not as part of the answer."""
        self._counts = dict.fromkeys(prompt.tolist(), 0)
        self._num_read = 0

    def table(self, output: list[int]) -> np.ndarray:
        """Distinct tokens and their counts, int32 [2, H]; ``output`` is the last call's with new tokens at its end."""
        for token in output[self._num_read :]:
            self._counts[token] = self._counts.get(token, 0) + 1
        self._num_read = len(output)
        counts = self._counts
        return np.stack([np.fromiter(part, np.int32, len(counts)) for part in (counts.keys(), counts.values())])


def inputs_of_rows(params: SamplingParams, history: History, output: list[int], end_ids: frozenset[int]) -> dict:
    """The fields of LogitsInputs that concern the rows from which tokens are drawn."""
    fields: dict = {"logprobs": -1 if params.logprobs is None else params.logprobs}
    if params.has_penalties:
        fields |= {
            "repetition": params.repetition_penalty,
            "frequency": params.frequency_penalty,
            "presence": params.presence_penalty,
            "history": history.table(output),
        }
    if params.logit_bias:
        ids, bias = zip(*params.logit_bias, strict=True)
        fields |= {"bias_ids": np.asarray(ids, dtype=np.int32), "bias": np.asarray(bias, dtype=np.float32)}
    if len(output) < params.min_tokens:
        ends = sorted(end_ids | set(params.stop_token_ids))
        fields |= {"min_tokens": params.min_tokens, "ends": np.asarray(ends, dtype=np.int32)}
    return fields


def targets_of_rows(prompt: np.ndarray, context: int, num_new_tokens: int, num_scored: int) -> dict:
    """The fields of LogitsInputs that concern the rows of known tokens, which follow ``context`` tokens: what comes
    after them in the prompt, as far as it is not among the ``num_scored`` tokens, the first left out, that were
    reported already."""
    first = max(context, num_scored)
    return {"first_target": first - context, "targets": prompt[first + 1 : context + num_new_tokens + 1]}
