"""What a step found, as plain data: from the ranks to the scheduler, and from there to whoever asked."""

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
    """Log-probabilities of T consecutive tokens, in nats: ``chosen`` float32 [T], ``top_ids`` int32 [T, N] and ``top``
    float32 [T, N] of the N likeliest tokens in each place, likeliest first."""

    chosen: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: slice) -> "TokenLogprobs":
        return TokenLogprobs(self.chosen[place], self.top_ids[place], self.top[place])

    @classmethod
    def join(cls, parts: Iterable["TokenLogprobs"]) -> "TokenLogprobs":
        """Return the parts, which have the same N, one after the other; without parts, those of no tokens."""
        parts = list(parts) or [cls(_NO_FLOATS, _NO_FLOATS.reshape(0, 0).astype(np.int32), _NO_FLOATS.reshape(0, 0))]
        chosen, top_ids, top = zip(*((p.chosen, p.top_ids, p.top) for p in parts), strict=True)
        return cls(np.concatenate(chosen), np.concatenate(top_ids), np.concatenate(top))


@dataclass(slots=True, kw_only=True)
class SegmentResult:
    """What the ranks found for one segment of a plan. ``tokens``: the accepted draft tokens, then the bonus token.
    ``accepted_nodes``: nodes of the accepted draft tokens in the segment's tree, by depth. ``head_candidates``: None
    if the heads did not run. ``logprobs`` of the tokens, and ``prompt_logprobs`` of the prompt tokens that this step
    scored: each None if it was not asked for."""

    tokens: list[int]
    accepted_nodes: list[int]
    head_candidates: HeadCandidates | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: TokenLogprobs | None = None


class RequestOutput(NamedTuple):
    """What one step gave the request ``key``. ``finish_reason`` (see ``FinishReason``) is None while it goes on.
    ``logprobs`` of the tokens and, with the first of them, ``prompt_logprobs``: each None unless it was asked for. A
    cancelled request ends with no tokens and the reason "cancelled"."""

    key: int
    tokens: list[int]
    finish_reason: str | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: TokenLogprobs | None = None
