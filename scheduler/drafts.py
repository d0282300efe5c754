"""Which guesses each request puts to the test in a step: a static tree's, or the step's own best.

Both kinds have the same face, which the scheduler uses and says what a step found. Shape suffixes: B requests, K heads,
R ranks, N nodes.
"""

from dataclasses import dataclass

import numpy as np

from euryale.scheduler.budget import Budget
from euryale.scheduler.forest import Forest, Roots
from euryale.scheduler.ngrams import ORDERS, TEXT, NgramTable, windows
from euryale.scheduler.request import Guesses, Request
from euryale.scheduler.survival import Survival, class_of
from euryale.scheduler.tree import DYNAMIC_DEPTH, TreeShape

_LEAST = 1e-3  # survival below which a node is not worth a thought
_UNKNOWN = 1  # a domain that nothing is ever learned of
_OWN, _TRAFFIC = 1 << 62, 1 << 61


@dataclass(frozen=True)
class Draft:
    """Guesses of one request: ``tokens`` int32 [N], ``parents`` int32 [N] (0: the root, i: the i-th guess)."""

    tokens: np.ndarray
    parents: np.ndarray


NO_DRAFT = Draft(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32))


class StaticTrees:
    """The same tree in every step and for every request, as far as the rows go."""

    def __init__(self, shape: TreeShape) -> None:
        self._shape = shape

    def wants_candidates(self) -> bool:
        """Whether the heads are to guess on in the step being planned."""
        return True

    def draft(self, decoding: list[Request], room: int, others: int) -> list[Draft]:
        """Guesses of each decoding request, ``room`` rows in all: equal shares, the first requests one more. ``others``
        rows of the step are prompts'."""
        drafting = {r.key: i for i, r in enumerate(r for r in decoding if r.guesses is not None and r.remaining > 1)}
        share, extra = divmod(max(room, 0), max(1, len(drafting)))
        drafts = []
        for request in decoding:
            place = drafting.get(request.key)
            count = 0 if place is None else share + (place < extra)
            # A guess deeper than the tokens still allowed cannot be used: the bonus token takes the last place.
            shape = self._shape.limited(min(count, self._shape.num_drafts), request.remaining - 1)
            drafts.append(Draft(shape.tokens(request.guesses.ids), shape.parents[1:]) if count else NO_DRAFT)
        return drafts

    def learn(self, found: list[tuple[Request, list[int], list[int]]]) -> None:
        """Take, for each request that gained tokens, these (accepted guesses and the bonus token) and the accepted
        nodes."""

    def observe(self, seconds: float) -> None:
        """Take how long the step took."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What dynamic trees learn from beside the heads; each can be switched off."""

    text: bool = True
    traffic: bool = True
    context: bool = True


class DynamicTrees:
    """The likeliest guesses over the whole batch, as many as pay."""

    def __init__(
        self,
        num_heads: int,
        num_candidates: int,
        each: int,
        budget: Budget | None = None,
        text: NgramTable | None = None,
        sources: Sources | None = None,
    ) -> None:
        """``num_candidates`` of each head are seen; ``each``: most guesses of one request; ``budget`` None: always that
        many; ``sources`` None: all."""
        self._each, self._budget, self._sources = each, budget, sources or Sources()
        self.forest = Forest((self._sources.text and text) or NgramTable(), Survival(num_heads))
        self._planned: list[Request] = []
        self._nodes = self._starts = np.zeros(0, dtype=np.int64)
        shape = (num_heads, num_candidates)
        self._none = Guesses(np.full(shape, -1, dtype=np.int32), np.zeros(shape, dtype=np.float32))

    def wants_candidates(self) -> bool:
        """See StaticTrees."""
        return self._budget is None or self._budget.wants_heads()

    def draft(self, decoding: list[Request], room: int, others: int) -> list[Draft]:
        """See StaticTrees."""
        self._planned = [r for r in decoding if r.params.speculation and r.remaining > 1]
        is_idle = self._budget is not None and not self._budget.begin(len(decoding), others)
        if is_idle or not self._planned:
            self._planned = []
            return [NO_DRAFT] * len(decoding)
        count = len(self._planned)
        most = min(room, count * self._each)
        if self._budget:
            most = min(most, self._budget.most)
        total = self.forest.grow(self._roots(), max(most, 0), self._each, _LEAST) - count
        if self._budget:
            total = self._budget.choose(self.forest.survival[count : count + total])
        nodes = np.arange(count, count + total)
        order = np.argsort(self.forest.request[nodes], kind="stable")
        self._nodes = nodes[order]
        owners = self.forest.request[self._nodes]
        self._starts = np.searchsorted(owners, np.arange(count + 1))
        local = np.zeros(count + total, dtype=np.int32)
        local[self._nodes] = np.arange(total) - self._starts[owners] + 1
        parents, tokens = local[self.forest.parent[self._nodes]], self.forest.token[self._nodes]
        cuts = self._starts[1:-1]
        drafts = map(Draft, np.split(tokens, cuts), np.split(parents, cuts))
        found = dict(zip((r.key for r in self._planned), drafts, strict=True))
        return [found.get(r.key, NO_DRAFT) for r in decoding]

    def learn(self, found: list[tuple[Request, list[int], list[int]]]) -> None:
        """See StaticTrees."""
        place = {request.key: i for i, request in enumerate(self._planned)}
        reached, truths = [], []
        for request, tokens, accepted in found:
            root = place.get(request.key)
            if root is None:
                continue
            path = [root, *self._nodes[self._starts[root] + np.asarray(accepted, dtype=np.int64) - 1].tolist()]
            reached += path
            truths += tokens
            request.momentum.learn(len(accepted), float(self.forest.expected[path].sum()))
        if reached:
            self.forest.learn(np.asarray(reached, dtype=np.int32), np.asarray(truths, dtype=np.int32))
        self._remember([request for request, _, _ in found])
        self._planned = []

    def observe(self, seconds: float) -> None:
        """See StaticTrees."""
        if self._budget:
            self._budget.observe(seconds)

    def _roots(self) -> Roots:
        requests = self._planned
        known = [r.guesses or self._none for r in requests]
        traffic = _TRAFFIC if self._sources.traffic else _UNKNOWN
        return Roots(
            last=np.stack([r.last_tokens(ORDERS) for r in requests]),
            ids=np.stack([g.ids for g in known]),
            logits=np.stack([g.logits for g in known]),
            depths=np.asarray([min(DYNAMIC_DEPTH, r.remaining - 1) for r in requests], dtype=np.int32),
            classes=np.asarray([class_of(r.params) for r in requests], dtype=np.int32),
            factors=np.asarray([r.momentum.factor for r in requests], dtype=np.float32),
            values=np.ones(len(requests), dtype=np.float32),
            domains=np.asarray([(_OWN + r.key, traffic, TEXT) for r in requests], dtype=np.int64),
        )

    def _remember(self, requests: list[Request]) -> None:
        """Learn what follows what in the requests' new tokens, and of requests that ended for others."""
        parts, domains = [], []
        for request in requests:
            if self._sources.context and not request.finish_reason:
                start = max(0, request.num_remembered - ORDERS)
                tokens = request.known_tokens(start, request.num_known)
                parts.append(windows(tokens, request.num_remembered - start))
                domains.append(np.full(len(parts[-1]), _OWN + request.key))
                request.num_remembered = request.num_known
            if self._sources.traffic and request.finish_reason:
                parts.append(windows(request.known_tokens(0, request.num_known), 0))
                domains.append(np.full(len(parts[-1]), _TRAFFIC))
        if parts:
            self.forest.add(np.concatenate(parts), np.concatenate(domains))
