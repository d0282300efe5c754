"""Results of a step, as plain data: from the ranks to the scheduler, and from there to the client."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_NO_FLOATS = np.zeros(0, dtype=np.float32)


class HeadCandidates(NamedTuple):
    """The heads' likeliest tokens after the last output token: ``ids`` int32 [heads, k], likeliest first, and their
    ``logits`` float32 [heads, k]."""

    ids: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of T consecutive tokens, in nats.

    ``chosen`` float32 [T]: of the tokens themselves. ``top_ids`` int32 [T, N] and ``top`` float32 [T, N]: the N
    likeliest tokens in each place, likeliest first, and their log-probabilities.
    """

    chosen: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: slice) -> "TokenLogprobs":
        return TokenLogprobs(self.chosen[place], self.top_ids[place], self.top[place])

    @classmethod
    def join(cls, parts: Iterable["TokenLogprobs"]) -> "TokenLogprobs":
        """Concatenate ``parts`` of equal N along T; without parts the result has T = N = 0."""
        parts = list(parts) or [cls(_NO_FLOATS, _NO_FLOATS.reshape(0, 0).astype(np.int32), _NO_FLOATS.reshape(0, 0))]
        chosen, top_ids, top = zip(*((p.chosen, p.top_ids, p.top) for p in parts), strict=True)
        return cls(np.concatenate(chosen), np.concatenate(top_ids), np.concatenate(top))


@dataclass(slots=True, kw_only=True)
class SegmentResult:
    """What the ranks computed for one segment of a plan.

    ``tokens``: the accepted draft tokens, then the bonus token. ``accepted_nodes``: tree nodes of the accepted draft
    tokens, by depth. ``head_candidates``: None if the heads did not run. ``logprobs``: of ``tokens``.
    ``prompt_logprobs``: of the prompt tokens scored in this step. Both are None if not requested.
    """

    tokens: list[int]
    accepted_nodes: list[int]
    head_candidates: HeadCandidates | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: TokenLogprobs | None = None


class RequestOutput(NamedTuple):
    """The output of one step for the request ``key``.

    ``finish_reason`` (see ``FinishReason``) is None while the request runs. ``logprobs``: of ``tokens``.
    ``prompt_logprobs``: of the prompt, with the first output tokens. Both are None if not requested. A cancelled
    request ends with no tokens and the reason "cancelled"."""

    key: int
    tokens: list[int]
    finish_reason: str | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: TokenLogprobs | None = None
