"""Inputs of the logits processors and of logprobs, for the requests that use them.

They are part of the plan, so that ranks keep no history of a request. Most requests have none and pay nothing.
``runtime/sampling/logits_processors.py`` and ``logprobs.py`` compute with them.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from euryale.scheduler.sampling_params import SamplingParams


def _no_ids() -> np.ndarray:
    return np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class LogitsInputs:
    """Inputs for one segment. Every field is a float, an int or an array: ``plan_codec.py`` derives its layout from the
    fields and their defaults.

    For the rows from which tokens are drawn:

    * ``repetition``, ``frequency``, ``presence``: the penalties.
    * ``history`` int32 [2, H]: distinct tokens, and how often the output so far has each. A count of 0 marks a token of
      the prompt. Draft tokens of this step are not counted.
    * ``bias_ids`` int32 [B], ``bias`` float32 [B]: tokens, and what is added to their logits.
    * ``ends`` int32 [E]: tokens that are not drawn before ``min_tokens`` output tokens.
    * ``logprobs``: how many likeliest tokens are reported beside the chosen one; -1 reports nothing.

    For the rows of known tokens:

    * ``targets`` int32 [T]: prompt tokens whose log-probabilities are reported. The first is the one after row
      ``first_target`` of the segment.
    * ``prompt_logprobs``: how many likeliest tokens are reported beside each of them.
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
        """Whether the logits depend on ``history``."""
        return self.repetition != 1 or self.frequency != 0 or self.presence != 0

    @property
    def changes_logits(self) -> bool:
        """Whether any logits processor applies."""
        return self.has_penalties or len(self.bias_ids) > 0 or len(self.ends) > 0


class History:
    """Counts each token of an output as it grows."""

    def __init__(self, prompt: np.ndarray) -> None:
        """``prompt`` int32 [T]: tokens that are listed with a count of 0."""
        self._counts = dict.fromkeys(prompt.tolist(), 0)
        self._num_counted = 0

    def table(self, output: list[int]) -> np.ndarray:
        """Return the distinct tokens and their counts, int32 [2, H].

        ``output`` must begin with the ``output`` of the last call."""
        for token in output[self._num_counted :]:
            self._counts[token] = self._counts.get(token, 0) + 1
        self._num_counted = len(output)
        counts = self._counts
        return np.stack([np.fromiter(part, np.int32, len(counts)) for part in (counts.keys(), counts.values())])


def inputs_of_rows(
    params: SamplingParams, history: History, output: list[int], end_ids: frozenset[int]
) -> dict[str, Any]:
    """Return the fields of LogitsInputs for the rows from which tokens are drawn.

    ``history`` counts the tokens of ``output``; ``end_ids``: the end-of-sequence tokens."""
    fields: dict[str, Any] = {"logprobs": -1 if params.logprobs is None else params.logprobs}
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


def targets_of_rows(prompt: np.ndarray, context: int, num_new_tokens: int, num_scored: int) -> dict[str, Any]:
    """Return the fields of LogitsInputs for ``num_new_tokens`` rows of known tokens after ``context`` tokens.

    The targets are the prompt tokens that follow these rows. The first ``num_scored`` tokens after the prompt's first
    one are left out, since they were reported before."""
    first = max(context, num_scored)
    return {"first_target": first - context, "targets": prompt[first + 1 : context + num_new_tokens + 1]}
