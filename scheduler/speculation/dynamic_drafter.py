"""The drafter of dynamic trees: the likeliest draft tokens of the whole batch, as many as the budget chooses."""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from euryale.scheduler.request import Request
from euryale.scheduler.speculation.acceptance_stats import AcceptanceRateCorrection, AcceptanceStats, sampling_class_of
from euryale.scheduler.speculation.constants import (
    BEHIND_TARGET_VALUE,
    EMPTY_SOURCE,
    MAX_LEARNED,
    MIN_PROBABILITY,
    ORDERS,
    TEXT_SOURCE,
)
from euryale.scheduler.speculation.draft_budget import BudgetChoice, DraftBudget
from euryale.scheduler.speculation.drafter import NO_DRAFT, Drafts, DraftTree, GrownDrafts, RequestStepResult
from euryale.scheduler.speculation.ngram_table import NgramTable
from euryale.scheduler.speculation.tree import DYNAMIC_DEPTH
from euryale.scheduler.speculation.tree_builder import GrownTrees, TreeBuilder, TreeRoots
from euryale.scheduler.step_result import HeadCandidates


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Which n-gram sources propose draft tokens, in addition to the heads: calibration text, recent traffic, and the
    request's own context."""

    text: bool = True
    traffic: bool = True
    context: bool = True


@dataclass(slots=True)
class _DrafterState:
    """The drafter's state of one request.

    ``sources``: ids of its own tokens, its traffic and the text. ``since``: when a request with a latency target began
    to decode, in seconds on the drafter's clock. ``num_learned``: known tokens that the n-gram table has learned.
    """

    sampling_class: int
    sources: tuple[int, int, int]
    correction: AcceptanceRateCorrection = field(default_factory=AcceptanceRateCorrection)
    since: float | None = None
    num_learned: int = 0


class DynamicDrafter:
    """Grows new trees for every step (see ``tree_builder.py``), and learns from the accepted tokens."""

    depth = DYNAMIC_DEPTH

    def __init__(
        self,
        num_heads: int,
        max_per_request: int,
        budget: DraftBudget | None = None,
        text: NgramTable | None = None,
        stats: AcceptanceStats | None = None,
        sources: Sources | None = None,
        secret: bytes = b"",
    ) -> None:
        """``max_per_request``: maximum number of draft tokens of one request. ``budget``: None verifies all of them.
        ``text``: n-grams of the calibration text. ``stats``: initial statistics. ``sources``: None uses all.
        ``secret``: at most 64 bytes that key the n-gram hashes, against crafted collisions."""
        self._max_per_request, self._budget, self._sources = max_per_request, budget, sources or Sources()
        table = text or NgramTable()
        if not self._sources.text:
            table = NgramTable(live_bits=table.live_bits)
        self.builder = TreeBuilder(table, stats or AcceptanceStats(num_heads))
        self._secret, self._numbers = secret, itertools.count()
        self._now = 0.0  # the drafter's clock: total seconds of all steps

    def draft(
        self,
        decoding: list[Request],
        max_depths: Callable[[], list[int]],
        room: int,
        num_prompt_rows: int = 0,
        num_prefilling: int = 0,
    ) -> Drafts:
        """See Drafter."""
        behind = {r.key for r in decoding if r.params.latency_target and r.params.speculation and self._is_behind(r)}
        choice = None
        if self._budget:
            if not behind and self._budget.is_resting(len(decoding) + num_prefilling):
                return Drafts(trees=[NO_DRAFT] * len(decoding), wants_heads=False)
            context = sum(r.num_computed for r in decoding)
            choice = self._budget.begin(len(decoding), num_prompt_rows, context, bool(behind), num_prefilling)
        depths = max_depths() if choice is None or choice.considers_drafts else []
        if not any(depths):
            return Drafts(
                trees=[NO_DRAFT] * len(decoding), wants_heads=choice is None or choice.wants_heads, choice=choice
            )
        drafting = [(r, depth) for r, depth in zip(decoding, depths, strict=True) if depth]
        requests = [r for r, _ in drafting]
        values = [BEHIND_TARGET_VALUE if r.key in behind else 1.0 for r in requests]
        roots = self._roots(requests, [depth for _, depth in drafting], values)
        trees, total = self._grow(roots, room, choice)
        drafts, nodes, starts = _split(trees, len(requests), total)
        grown = GrownDrafts(requests=requests, trees=trees, nodes=nodes, starts=starts)
        in_order = iter(drafts)
        return Drafts(
            trees=[next(in_order) if depth else NO_DRAFT for depth in depths],
            wants_heads=choice is None or choice.wants_heads,
            choice=choice,
            grown=grown,
        )

    def learn(self, drafts: Drafts, results: list[RequestStepResult]) -> None:
        """See Drafter."""
        if drafts.grown:
            self._learn_acceptance(drafts.grown, results)
        # Running requests learn only before a step that may speculate; they catch up on missed tokens then.
        learns_running = self._sources.context and drafts.wants_heads
        learns_finished = self._sources.traffic
        requests = [r.request for r in results if (learns_finished if r.request.finish_reason else learns_running)]
        if requests:
            self._learn_tokens(requests)

    def observe(self, drafts: Drafts, results: list[RequestStepResult], seconds: float) -> None:
        """See Drafter."""
        self._now += seconds
        if self._budget and drafts.choice:
            num_accepted = sum(len(result.accepted_nodes) for result in results)
            self._budget.observe(drafts.choice, seconds, num_accepted)

    def _learn_acceptance(self, grown: GrownDrafts, results: list[RequestStepResult]) -> None:
        """Learn from all draft tokens proposed below an accepted node, verified or not."""
        place = {request.key: i for i, request in enumerate(grown.requests)}
        nodes, starts = grown.nodes.tolist(), grown.starts.tolist()
        expected = grown.trees.expected_children[: grown.trees.num_nodes].tolist()
        reached: list[int] = []
        truths: list[int] = []
        for result in results:
            at = place.get(result.request.key)
            if at is None:
                continue
            path = [nodes[starts[at] + number] for number in (0, *result.accepted_nodes)]
            reached += path
            truths += result.tokens
            correction = self._state(result.request).correction
            correction.learn(len(result.accepted_nodes), sum(map(expected.__getitem__, path)))
        if reached:
            self.builder.learn(grown.trees, np.asarray(reached, dtype=np.int32), np.asarray(truths, dtype=np.int32))

    def _learn_tokens(self, requests: list[Request]) -> None:
        """Add the requests' new tokens to the n-gram table: to their own source, or to the traffic if they ended."""
        sequences = []
        for request in requests:
            state = self._state(request)
            own, traffic, _ = state.sources
            start, source = (0, traffic) if request.finish_reason else (state.num_learned, own)
            start = max(start, request.num_known - MAX_LEARNED)
            first = max(0, start - ORDERS)
            sequences.append((request.known_tokens(first, request.num_known), start - first, source))
            state.num_learned = request.num_known
        self.builder.add(sequences)

    def _state(self, request: Request) -> _DrafterState:
        """Return the request's state, made on first use."""
        state = request.drafter_state
        if state is None:
            own = self._source(f"request {next(self._numbers)}")  # a request's key may be reused
            traffic = self._source(f"salt {request.params.cache_salt}") if self._sources.traffic else EMPTY_SOURCE
            state = _DrafterState(sampling_class_of(request.params), (own, traffic, TEXT_SOURCE))
            request.drafter_state = state
        assert isinstance(state, _DrafterState)
        return state

    def _source(self, name: str) -> int:
        """Return the id of a named source, larger than the reserved ids."""
        digest = hashlib.blake2b(name.encode(), digest_size=8, key=self._secret).digest()
        return (int.from_bytes(digest) >> 2) + EMPTY_SOURCE + 1

    def _is_behind(self, request: Request) -> bool:
        """Return whether the mean time of the request's tokens exceeds its latency target."""
        state = self._state(request)
        if state.since is None:  # before its first decoding step
            state.since = self._now
        return 1000 * (self._now - state.since) > request.params.latency_target * (len(request.output) - 1)

    def _roots(self, requests: list[Request], depths: list[int], values: list[float]) -> TreeRoots:
        """Return the inputs of the tree builder for the requests."""
        known = [r.head_candidates for r in requests]
        shape = next((c.ids.shape for c in known if c is not None), (0, 0))
        none = HeadCandidates(np.full(shape, -1, dtype=np.int32), np.zeros(shape, dtype=np.float32))
        candidates = [none if c is None else c for c in known]
        states = [self._state(r) for r in requests]
        return TreeRoots(
            last=np.array([r.last_tokens(ORDERS) for r in requests], dtype=np.int32),
            ids=np.stack([c.ids for c in candidates]),
            logits=np.stack([c.logits for c in candidates]),
            depths=np.array(depths, dtype=np.int32),
            classes=np.array([s.sampling_class for s in states], dtype=np.int32),
            factors=np.array([s.correction.factor for s in states], dtype=np.float32),
            values=np.array(values, dtype=np.float32),
            sources=np.array([s.sources for s in states], dtype=np.int64),
        )

    def _grow(self, roots: TreeRoots, room: int, choice: BudgetChoice | None) -> tuple[GrownTrees, int]:
        """Return the trees, and how many of their draft tokens are verified, likeliest first."""
        count = len(roots.depths)
        proposed = self._budget.max_proposed(choice) if self._budget and choice else room
        max_draft_tokens = max(0, min(room, count * self._max_per_request, proposed))
        trees = self.builder.grow(roots, max_draft_tokens, self._max_per_request, MIN_PROBABILITY)
        total = trees.num_nodes - count
        if self._budget and choice:
            grown = slice(count, count + total)
            values = roots.values[trees.request[grown]]
            total = self._budget.choose(choice, trees.acceptance_probability[grown] * values)
        return trees, total


def _split(trees: GrownTrees, count: int, total: int) -> tuple[list[DraftTree], np.ndarray, np.ndarray]:
    """Return the first ``total`` draft tokens below the ``count`` roots, split by request.

    Also returns the ``nodes`` and ``starts`` of GrownDrafts, int64 [count + total] and int64 [count + 1]."""
    owners, places = trees.request[: count + total], np.arange(count + total)
    nodes = owners.argsort(kind="stable")  # the root comes first
    owners = owners[nodes]
    starts = np.searchsorted(owners, np.arange(count + 1))
    number = np.empty(count + total, dtype=np.int32)  # of each node in its request's tree
    number[nodes] = places - starts[owners]
    tokens, parents = trees.token[nodes], number[trees.parent[nodes]]
    deepest = np.maximum.reduceat(trees.depth[nodes], starts[:-1])
    ends = zip(pairwise(starts.tolist()), deepest.tolist(), strict=True)
    drafts = [DraftTree(tokens[a:b], parents[a + 1 : b], depth) if depth else NO_DRAFT for (a, b), depth in ends]
    return drafts, nodes, starts
