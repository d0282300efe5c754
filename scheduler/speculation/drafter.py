"""Which draft tokens each request has verified in a step: the protocol of drafters, and static trees."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from euryale.scheduler.request import Request
from euryale.scheduler.speculation.draft_budget import BudgetChoice
from euryale.scheduler.speculation.tree import TreeShape
from euryale.scheduler.speculation.tree_builder import GrownTrees
from euryale.scheduler.step_result import HeadCandidates


class DraftTree(NamedTuple):
    """The draft tokens of one request: ``tokens`` int32 [1 + N], the root, which is its last known token, and the draft
    tokens; ``parents`` int32 [N], of each draft token (0: the root, i: the i-th draft token); ``depth`` of the deepest.
    Without draft tokens there is no root either."""

    tokens: np.ndarray
    parents: np.ndarray
    depth: int


NO_DRAFT = DraftTree(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), 0)


@dataclass(frozen=True, kw_only=True)
class GrownDrafts:
    """What a dynamic drafter has to know when the step is done: the ``requests`` it grew ``trees`` for, the trees'
    ``nodes`` int64 [N] sorted by request, and where each request's ``starts`` among them, int64 [requests + 1]."""

    requests: list[Request]
    trees: GrownTrees
    nodes: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """What a drafter proposes for a step: one of ``trees`` for each decoding request; ``wants_heads``: the heads run in
    this step; ``choice`` of the budget, None if there is none; ``grown``: None for static trees."""

    trees: list[DraftTree]
    wants_heads: bool
    choice: BudgetChoice | None = None
    grown: GrownDrafts | None = None


class RequestStepResult(NamedTuple):
    """What a step found out for a request: its new ``tokens``, accepted draft tokens and the bonus token; the tree
    nodes of the accepted ones, by depth; how many draft tokens were verified; and the ``head_candidates`` that were
    known before the step, None if the heads had not run."""

    request: Request
    tokens: list[int]
    accepted_nodes: list[int]
    num_draft_tokens: int = 0
    head_candidates: HeadCandidates | None = None


class Drafter(Protocol):
    """For each step the scheduler calls ``draft`` and, when the step is done, ``learn`` with what ``draft`` returned.
    ``depth``: of the deepest draft token."""

    depth: int

    def draft(self, decoding: list[Request], depths: list[int], room: int, num_prompt_rows: int) -> Drafts:
        """Return draft tokens for each decoding request, no deeper than its of ``depths`` and at most ``room`` in all,
        beside ``num_prompt_rows`` rows of prompts."""
        ...

    def learn(self, drafts: Drafts, results: list[RequestStepResult], seconds: float) -> None:
        """Take what the step found, and how long it took (0: nobody measured)."""
        ...


class StaticDrafter:
    """The same tree in every step and for every request, as far as there are rows."""

    def __init__(self, shape: TreeShape) -> None:
        self._shape, self.depth = shape, shape.depth

    def draft(self, decoding: list[Request], depths: list[int], room: int, num_prompt_rows: int) -> Drafts:
        """See Drafter. All get the same number of rows, the first requests one more."""
        drafting = [i for i, r in enumerate(decoding) if r.head_candidates is not None and depths[i]]
        rows, extra = divmod(max(room, 0), max(1, len(drafting)))
        trees = [NO_DRAFT] * len(decoding)
        for place, i in enumerate(drafting):
            shape, candidates = self._shape.limited(rows + (place < extra), depths[i]), decoding[i].head_candidates
            if not shape.depth or candidates is None:
                continue
            tokens = np.array([*decoding[i].last_tokens(1), *shape.tokens(candidates.ids)], dtype=np.int32)
            trees[i] = DraftTree(tokens, shape.parents[1:], shape.depth)
        return Drafts(trees=trees, wants_heads=True)

    def learn(self, drafts: Drafts, results: list[RequestStepResult], seconds: float) -> None:
        """See Drafter; there is nothing to learn."""
