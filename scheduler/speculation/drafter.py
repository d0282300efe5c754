"""The protocol of drafters, which propose draft tokens for each step, and the drafter of static trees."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from euryale.scheduler.request import Request
from euryale.scheduler.speculation.draft_budget import BudgetChoice
from euryale.scheduler.speculation.tree import TreeShape
from euryale.scheduler.speculation.tree_builder import GrownTrees
from euryale.scheduler.step_result import HeadCandidates


class DraftTree(NamedTuple):
    """The N draft tokens of one request, as a tree.

    ``tokens`` int32 [1 + N]: the root, which is the last known token, and the draft tokens. ``parents`` int32 [N]: each
    draft token's parent (0: the root, i: the i-th draft token). ``depth``: of the deepest draft token. NO_DRAFT has no
    root either.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depth: int


NO_DRAFT = DraftTree(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), 0)


@dataclass(frozen=True, kw_only=True)
class GrownDrafts:
    """What a dynamic drafter needs to learn from a step: the ``trees`` it grew for ``requests``.

    ``nodes`` int64 [N]: verified tree nodes and roots, sorted by request. ``starts`` int64 [requests + 1]: the index of
    each request's first one, and N.
    """

    requests: list[Request]
    trees: GrownTrees
    nodes: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """A drafter's proposal for a step.

    ``trees``: one for each decoding request. ``wants_heads``: the heads run in this step. ``choice``: the budget's,
    None without a budget. ``grown``: None for static trees.
    """

    trees: list[DraftTree]
    wants_heads: bool
    choice: BudgetChoice | None = None
    grown: GrownDrafts | None = None


class RequestStepResult(NamedTuple):
    """A request's step result: what speculation gave it.

    ``tokens``: the accepted draft tokens and the bonus token. ``accepted_nodes``: tree nodes of the accepted draft
    tokens, by depth. ``num_draft_tokens``: how many were verified. ``head_candidates``: those the tree was made from,
    None if the heads had not run.
    """

    request: Request
    tokens: list[int]
    accepted_nodes: list[int]
    num_draft_tokens: int = 0
    head_candidates: HeadCandidates | None = None


class Drafter(Protocol):
    """Proposes draft tokens. ``depth`` is the maximum depth of a draft token.

    For each step the scheduler calls ``draft``, then ``learn`` and, if the step was timed, ``observe``, both with what
    ``draft`` returned."""

    depth: int

    def draft(
        self,
        decoding: list[Request],
        max_depths: Callable[[], list[int]],
        room: int,
        num_prompt_rows: int = 0,
        num_prefilling: int = 0,
    ) -> Drafts:
        """Return draft tokens for the ``decoding`` requests, at most ``room`` in total.

        ``max_depths`` returns the maximum depth of each request's tree, 0 for no draft tokens; a step without draft
        tokens need not call it. ``num_prompt_rows``: prompt rows in the same step, of some of ``num_prefilling``
        requests."""
        ...

    def learn(self, drafts: Drafts, results: list[RequestStepResult]) -> None:
        """Learn from the ``results`` of a step."""

    def observe(self, drafts: Drafts, results: list[RequestStepResult], seconds: float) -> None:
        """Learn from the measured ``seconds`` of a step, after ``learn``."""
        ...


class StaticDrafter:
    """Proposes the same tree in every step for every request, cut to the rows available."""

    def __init__(self, shape: TreeShape) -> None:
        self._shape, self.depth = shape, shape.depth

    def draft(
        self,
        decoding: list[Request],
        max_depths: Callable[[], list[int]],
        room: int,
        num_prompt_rows: int = 0,
        num_prefilling: int = 0,
    ) -> Drafts:
        """See Drafter. Every request gets an equal part of ``room``, and the first ones the remainder."""
        depths = max_depths()
        drafting = [i for i, r in enumerate(decoding) if r.head_candidates is not None and depths[i]]
        rows, remainder = divmod(max(room, 0), max(1, len(drafting)))
        trees = [NO_DRAFT] * len(decoding)
        for place, i in enumerate(drafting):
            shape, candidates = self._shape.limited(rows + (place < remainder), depths[i]), decoding[i].head_candidates
            if not shape.depth or candidates is None:
                continue
            tokens = np.array([*decoding[i].last_tokens(1), *shape.tokens(candidates.ids)], dtype=np.int32)
            trees[i] = DraftTree(tokens, shape.parents[1:], shape.depth)
        return Drafts(trees=trees, wants_heads=True)

    def learn(self, drafts: Drafts, results: list[RequestStepResult]) -> None:
        """See Drafter; static trees learn nothing."""

    def observe(self, drafts: Drafts, results: list[RequestStepResult], seconds: float) -> None:
        """See Drafter; static trees learn nothing."""
