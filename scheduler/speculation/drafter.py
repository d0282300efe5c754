"""Which guesses each request puts to the test in a step: a static tree's, or the step's own best."""

import hashlib
import itertools
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from euryale.scheduler.request import HeadCandidates, Request
from euryale.scheduler.speculation.acceptance_stats import AcceptanceRateCorrection, AcceptanceStats, sampling_class_of
from euryale.scheduler.speculation.draft_budget import Budget, BudgetChoice
from euryale.scheduler.speculation.ngram_table import ORDERS, TEXT, NgramTable
from euryale.scheduler.speculation.tree import DYNAMIC_DEPTH, TreeShape
from euryale.scheduler.speculation.tree_builder import TreeBuilder, TreeRoots

_BEHIND = 4.0  # what a guess of a request behind its latency target is worth beside others'
_LEAST = 1e-3  # acceptance_probability below which a node is not worth a thought
_UNKNOWN = 1  # a source of n-grams of which nothing is ever learned
_MOST_LEARNED = 4096  # tokens that a request teaches at once, its last ones


class Draft(NamedTuple):
    """Guesses of one request: ``tokens`` int32 [1 + N], of the root, its last known token, and of the guesses;
    ``parents`` int32 [N] (0: the root, i: the i-th guess); ``depth`` of the deepest. Without guesses no root either."""

    tokens: np.ndarray
    parents: np.ndarray
    depth: int


NO_DRAFT = Draft(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), 0)


class RequestStepResult(NamedTuple):
    """What a step found out: the request's new ``tokens``, accepted guesses and the bonus token, and the numbers of the
    accepted guesses, of ``num_draft_tokens``; ``guesses`` is what the heads had named, None if they had not run."""

    request: Request
    tokens: list[int]
    accepted_nodes: list[int]
    num_draft_tokens: int = 0
    head_candidates: HeadCandidates | None = None


class Drafter(Protocol):
    """For each step the scheduler calls ``draft``, then ``wants_heads``, then, when the step is done, ``learn``.
    ``depth``: of the deepest guess; ``choice``: what was chosen for the last step, None if that is not a question."""

    depth: int

    @property
    def choice(self) -> BudgetChoice | None: ...

    def draft(self, decoding: list[Request], depths: list[int], room: int, num_prompt_rows: int) -> list[Draft]:
        """Guesses of each decoding request, of at most ``depths`` and ``room`` rows in all, beside ``others``, the
        prompts' rows."""

    def wants_heads(self) -> bool:
        """Whether the heads are to run in this step."""

    def learn(self, step_results: list[RequestStepResult], seconds: float) -> None:
        """Take what the step found, and how long it took (0: nobody measured)."""


class StaticTrees:
    """The same tree in every step and for every request, as far as the rows go."""

    choice = None

    def __init__(self, shape: TreeShape) -> None:
        self._shape, self.depth = shape, shape.depth

    def draft(self, decoding: list[Request], depths: list[int], room: int, num_prompt_rows: int) -> list[Draft]:
        """See Drafter. Equal shares, the first requests one more."""
        drafting = [i for i, r in enumerate(decoding) if r.head_candidates is not None and depths[i]]
        share, extra = divmod(max(room, 0), max(1, len(drafting)))
        drafts = [NO_DRAFT] * len(decoding)
        for place, i in enumerate(drafting):
            shape = self._shape.limited(share + (place < extra), depths[i])
            if not shape.depth:
                continue
            request = decoding[i]
            tokens = np.array([*request.last_tokens(1), *shape.tokens(request.head_candidates.ids)], dtype=np.int32)
            drafts[i] = Draft(tokens, shape.parents[1:], shape.depth)
        return drafts

    def wants_heads(self) -> bool:
        """See Drafter."""
        return True

    def learn(self, step_results: list[RequestStepResult], seconds: float) -> None:
        """See Drafter."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What dynamic trees learn from beside the heads; each can be switched off."""

    text: bool = True
    traffic: bool = True
    context: bool = True


@dataclass(slots=True)
class _Kept:
    """What dynamic trees keep of a request: the ``kind`` of its estimates, its ``sources`` of n-grams, its luck, since
    when it decodes, in seconds on the trees' clock, and how many of its known tokens they have learned from."""

    kind: int
    sources: tuple[int, int, int]
    correction: AcceptanceRateCorrection = field(default_factory=AcceptanceRateCorrection)
    since: float | None = None
    num_learned: int = 0


class DynamicTrees:
    """The likeliest guesses over the whole batch, as many as pay."""

    depth = DYNAMIC_DEPTH

    def __init__(
        self,
        num_heads: int,
        each: int,
        budget: Budget | None = None,
        text: NgramTable | None = None,
        acceptance_probability: AcceptanceStats | None = None,
        sources: Sources | None = None,
        secret: bytes = b"",
    ) -> None:
        """``each``: most guesses of one request; ``budget`` None: always that many; ``acceptance_probability``: to
        begin with; ``sources`` None: all; ``secret``: at most 64 bytes, without which nobody can choose tokens whose
        contexts take the place of others'."""
        self._each, self._budget, self._sources = each, budget, sources or Sources()
        table = text or NgramTable()
        if not self._sources.text:
            table = NgramTable(live_bits=table.live_bits)
        self.builder = TreeBuilder(table, acceptance_probability or AcceptanceStats(num_heads))
        self._secret, self._numbers = secret, itertools.count()
        self._now = 0.0  # seconds that steps have taken
        self._planned: list[Request] = []
        self._nodes = self._starts = np.zeros(0, dtype=np.int64)

    @property
    def choice(self) -> BudgetChoice | None:
        """See Drafter."""
        return self._budget.last if self._budget else None

    def wants_heads(self) -> bool:
        """See Drafter."""
        return self._budget is None or self._budget.wants_heads()

    def draft(self, decoding: list[Request], depths: list[int], room: int, num_prompt_rows: int) -> list[Draft]:
        """See Drafter."""
        drafting = [(r, depth) for r, depth in zip(decoding, depths, strict=True) if depth]
        values = [_BEHIND if self._is_behind(r) else 1.0 for r, _ in drafting]
        self._planned = []
        if self._budget:
            context = sum(r.num_computed for r in decoding)
            if not self._budget.begin(len(decoding), num_prompt_rows, context, is_urgent=_BEHIND in values):
                return [NO_DRAFT] * len(decoding)
        if not drafting:
            return [NO_DRAFT] * len(decoding)
        self._planned = [r for r, _ in drafting]
        drafts = iter(self._grow(self._roots([depth for _, depth in drafting], values), room))
        return [next(drafts) if depth else NO_DRAFT for depth in depths]

    def learn(self, step_results: list[RequestStepResult], seconds: float) -> None:
        """See Drafter."""
        self._now += seconds
        place = {request.key: i for i, request in enumerate(self._planned)}
        reached, truths = [], []
        nodes, starts = self._nodes.tolist(), self._starts.tolist()
        expected = self.builder.expected_children[: self.builder.num_nodes].tolist() if self._planned else []
        for request, tokens, accepted, _, _ in step_results:
            kept = self._kept(request)
            if kept.since is None:
                kept.since = self._now
            root = place.get(request.key)
            if root is None:
                continue
            path = [nodes[starts[root] + number] for number in (0, *accepted)]
            reached += path
            truths += tokens
            kept.correction.learn(len(accepted), sum(map(expected.__getitem__, path)))
        if reached:
            self.builder.learn(np.asarray(reached, dtype=np.int32), np.asarray(truths, dtype=np.int32))
        # Of those that go on only before a step that may guess: many have none, and what was missed is caught up on.
        goes_on = self._sources.context and self.wants_heads()
        requests = [step_result.request for step_result in step_results]
        self._remember([r for r in requests if (self._sources.traffic if r.finish_reason else goes_on)])
        if self._budget and seconds:
            self._budget.observe(seconds, sum(len(step_result.accepted_nodes) for step_result in step_results))
        self._planned = []

    def _kept(self, request: Request) -> _Kept:
        if request.drafting is None:
            own = self._source(f"request {next(self._numbers)}")  # a key may come again
            traffic = self._source(f"salt {request.params.cache_salt}") if self._sources.traffic else _UNKNOWN
            request.drafting = _Kept(sampling_class_of(request.params), (own, traffic, TEXT))
        return request.drafting

    def _source(self, name: str) -> int:
        """A source of n-grams, above all those with a meaning of their own."""
        digest = hashlib.blake2b(name.encode(), digest_size=8, key=self._secret).digest()
        return (int.from_bytes(digest) >> 2) + _UNKNOWN + 1

    def _is_behind(self, request: Request) -> bool:
        """Whether its tokens took longer than its latency target until now."""
        target, since = request.params.latency_target, self._kept(request).since
        return bool(target) and since is not None and 1000 * (self._now - since) > target * (len(request.output) - 1)

    def _roots(self, depths: list[int], values: list[float]) -> TreeRoots:
        guesses = [r.head_candidates for r in self._planned]
        if None in guesses:
            shape = next((g.ids.shape for g in guesses if g), (0, 0))
            none = HeadCandidates(np.full(shape, -1, dtype=np.int32), np.zeros(shape, dtype=np.float32))
            guesses = [g or none for g in guesses]
        kept = [self._kept(r) for r in self._planned]
        return TreeRoots(
            last=np.array([r.last_tokens(ORDERS) for r in self._planned], dtype=np.int32),
            ids=np.stack([g.ids for g in guesses]),
            logits=np.stack([g.logits for g in guesses]),
            depths=np.array(depths, dtype=np.int32),
            classes=np.array([k.kind for k in kept], dtype=np.int32),
            factors=np.array([k.correction.factor for k in kept], dtype=np.float32),
            values=np.array(values, dtype=np.float32),
            sources=np.array([k.sources for k in kept], dtype=np.int64),
        )

    def _grow(self, roots: TreeRoots, room: int) -> list[Draft]:
        """The guesses of each root that are worth it."""
        count = len(roots.depths)
        most = max(0, min(room, count * self._each, self._budget.reach() if self._budget else room))
        total = self.builder.grow(roots, most, self._each, _LEAST) - count
        if self._budget:
            found = slice(count, count + total)
            total = self._budget.choose(
                self.builder.acceptance_probability[found] * roots.values[self.builder.request[found]]
            )
        return self._split(count, total)

    def _split(self, count: int, total: int) -> list[Draft]:
        """The roots and the first ``total`` guesses of the builder, by request; remembers which is whose."""
        owners, places = self.builder.request[: count + total], np.arange(count + total)
        self._nodes = owners.argsort(kind="stable")  # the root comes first
        owners = owners[self._nodes]
        self._starts = np.searchsorted(owners, np.arange(count + 1))
        number = np.empty(count + total, dtype=np.int32)  # of a node in its request's tree
        number[self._nodes] = places - self._starts[owners]
        tokens, parents = self.builder.token[self._nodes], number[self.builder.parent[self._nodes]]
        deepest = np.maximum.reduceat(self.builder.depth[self._nodes], self._starts[:-1])
        ends = zip(pairwise(self._starts.tolist()), deepest.tolist(), strict=True)
        return [Draft(tokens[a:b], parents[a + 1 : b], depth) if depth else NO_DRAFT for (a, b), depth in ends]

    def _remember(self, requests: list[Request]) -> None:
        """Learn what follows what in the requests' new tokens: for themselves, and if they ended for others."""
        sequences = []
        for request in requests:
            kept = self._kept(request)
            own, traffic, _ = kept.sources
            start, source = (0, traffic) if request.finish_reason else (kept.num_learned, own)
            start = max(start, request.num_known - _MOST_LEARNED)
            first = max(0, start - ORDERS)
            sequences.append((request.known_tokens(first, request.num_known), start - first, source))
            kept.num_learned = request.num_known
        if sequences:
            self.builder.add(sequences)
