"""The step plan: what one step computes, as plain data.

Each request in a plan is a *segment* of rows. Its new tokens come first, as a chain: known tokens whose K/V are not
computed yet. Its draft tokens follow, as a tree whose root is the last new token. A segment has all that a rank needs
of its request, so that ranks keep no state of requests but the K/V in their pages. ``plan_codec.py`` encodes plans.
"""

import enum
from dataclasses import dataclass, field

import numpy as np

from euryale.scheduler.logits_inputs import LogitsInputs
from euryale.scheduler.sampling_params import SamplingParams


class PlanKind(enum.IntEnum):
    """What a plan asks of a rank."""

    STEP = 0
    HEARTBEAT = 1  # nothing to compute; shows the other ranks that rank 0 is alive
    STOP = 2  # leave the loop


@dataclass(slots=True, kw_only=True)  # not frozen: a frozen one takes four times as long to create
class Segment:
    """One request's rows of a step.

    ``tokens`` int32 [num_new_tokens + num_draft_tokens]; ``parents`` int32 [num_draft_tokens], each draft token's
    parent as a tree node (0: the root, which is the last new token); ``pages`` int32, ids of the request's pages in
    order. ``context`` counts the committed tokens. ``emits_tokens``: the last new token is the last known one, so that
    the step emits tokens for this request. ``wants_head_candidates``: the Medusa heads run for it. ``output_index``
    counts the output tokens so far and is the counter of the sampling noise. ``sample_index`` numbers the independent
    answers to one prompt. ``logits_inputs``: None for most requests.
    """

    tokens: np.ndarray
    parents: np.ndarray
    pages: np.ndarray
    context: int
    emits_tokens: bool
    wants_head_candidates: bool
    output_index: int
    params: SamplingParams
    sample_index: int = 0
    logits_inputs: LogitsInputs | None = None

    @property
    def has_result(self) -> bool:
        """Whether the step has a result for this request: tokens, or log-probabilities of its prompt."""
        return self.emits_tokens or (self.logits_inputs is not None and len(self.logits_inputs.targets) > 0)

    @property
    def num_draft_tokens(self) -> int:
        """Rows with draft tokens."""
        return len(self.parents)

    @property
    def num_new_tokens(self) -> int:
        """Rows with known tokens."""
        return len(self.tokens) - len(self.parents)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What all ranks execute in one step. ``epoch`` identifies the run of the group. ``digest`` is rank 0's digest of
    all tokens accepted so far; a rank with a different one has diverged."""

    kind: PlanKind = PlanKind.STEP
    epoch: int = 0
    step: int = 0
    digest: int = 0
    segments: list[Segment] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Rows of all segments."""
        return sum(len(s.tokens) for s in self.segments)
