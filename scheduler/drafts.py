"""Which guesses each request puts to the test in a step: a static tree's, or the step's own best."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from euryale.scheduler.budget import Budget
from euryale.scheduler.forest import Forest, Roots
from euryale.scheduler.ngrams import ORDERS, TEXT, NgramTable, windows
from euryale.scheduler.request import Guesses, Request
from euryale.scheduler.survival import Survival, class_of
from euryale.scheduler.tree import DYNAMIC_DEPTH, TreeShape

_LEAST = 1e-3  # survival below which a node is not worth a thought
_UNKNOWN, _OWN, _TRAFFIC = 1, 1 << 62, 1 << 61  # domains of n-grams: nothing is ever learned of the first


@dataclass(frozen=True)
class Draft:
    """Guesses of one request: ``tokens`` int32 [N], ``parents`` int32 [N] (0: the root, i: the i-th guess)."""

    tokens: np.ndarray
    parents: np.ndarray

    @property
    def depth(self) -> int:
        """Of the deepest guess."""
        depths = [0]
        for parent in self.parents.tolist():
            depths.append(depths[parent] + 1)
        return max(depths)


NO_DRAFT = Draft(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32))


@dataclass(frozen=True)
class Tested:
    """What a step found out: the request's new ``tokens``, accepted guesses and the bonus token, and the numbers of the
    accepted guesses."""

    request: Request
    tokens: list[int]
    accepted: list[int]


class Drafter(Protocol):
    """For each step the scheduler calls ``draft``, then ``wants_guesses``, then, when the step is done, ``learn``.
    ``depth``: of the deepest guess."""

    depth: int

    def draft(self, decoding: list[Request], depths: list[int], room: int, others: int) -> list[Draft]:
        """Guesses of each decoding request, of at most ``depths`` and ``room`` rows in all, beside ``others``, the
        prompts' rows."""

    def wants_guesses(self) -> bool:
        """Whether the heads are to run in this step."""

    def learn(self, tested: list[Tested], seconds: float) -> None:
        """Take what the step found, and how long it took (0: nobody measured)."""


class StaticTrees:
    """The same tree in every step and for every request, as far as the rows go."""

    def __init__(self, shape: TreeShape) -> None:
        self._shape, self.depth = shape, shape.depth

    def draft(self, decoding: list[Request], depths: list[int], room: int, others: int) -> list[Draft]:
        """See Drafter. Equal shares, the first requests one more."""
        drafting = [i for i, r in enumerate(decoding) if r.guesses is not None and depths[i]]
        share, extra = divmod(max(room, 0), max(1, len(drafting)))
        drafts = [NO_DRAFT] * len(decoding)
        for place, i in enumerate(drafting):
            shape = self._shape.limited(share + (place < extra), depths[i])
            drafts[i] = Draft(shape.tokens(decoding[i].guesses.ids), shape.parents[1:])
        return drafts

    def wants_guesses(self) -> bool:
        """See Drafter."""
        return True

    def learn(self, tested: list[Tested], seconds: float) -> None:
        """See Drafter."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What dynamic trees learn from beside the heads; each can be switched off."""

    text: bool = True
    traffic: bool = True
    context: bool = True


class DynamicTrees:
    """The likeliest guesses over the whole batch, as many as pay."""

    depth = DYNAMIC_DEPTH

    def __init__(
        self,
        num_heads: int,
        each: int,
        budget: Budget | None = None,
        text: NgramTable | None = None,
        survival: Survival | None = None,
        sources: Sources | None = None,
    ) -> None:
        """``each``: most guesses of one request; ``budget`` None: always that many; ``survival``: to begin with;
        ``sources`` None: all."""
        self._each, self._budget, self._sources = each, budget, sources or Sources()
        self.forest = Forest((self._sources.text and text) or NgramTable(), survival or Survival(num_heads))
        self._planned: list[Request] = []
        self._nodes = self._starts = np.zeros(0, dtype=np.int64)

    def wants_guesses(self) -> bool:
        """See Drafter."""
        return self._budget is None or self._budget.wants_heads()

    def draft(self, decoding: list[Request], depths: list[int], room: int, others: int) -> list[Draft]:
        """See Drafter."""
        self._planned = []
        if self._budget and not self._budget.begin(len(decoding), others, sum(r.num_computed for r in decoding)):
            return [NO_DRAFT] * len(decoding)
        drafting = [i for i, depth in enumerate(depths) if depth]
        self._planned = [decoding[i] for i in drafting]
        count = len(drafting)
        most = max(0, min(room, count * self._each))
        total = 0
        if count:
            roots = _roots(self._planned, [depths[i] for i in drafting], self._sources)
            total = self.forest.grow(roots, most, self._each, _LEAST) - count
        if self._budget:
            total = self._budget.choose(self.forest.survival[count : count + total])
        found = self._split(count, total)
        drafts = [NO_DRAFT] * len(decoding)
        for i, draft in zip(drafting, found, strict=True):
            drafts[i] = draft
        return drafts

    def learn(self, tested: list[Tested], seconds: float) -> None:
        """See Drafter."""
        place = {request.key: i for i, request in enumerate(self._planned)}
        reached, truths = [], []
        for test in tested:
            root = place.get(test.request.key)
            if root is None:
                continue
            accepted = self._nodes[self._starts[root] + np.asarray(test.accepted, dtype=np.int64) - 1]
            path = [root, *accepted.tolist()]
            reached += path
            truths += test.tokens
            test.request.momentum.learn(len(accepted), float(self.forest.expected[path].sum()))
        if reached:
            self.forest.learn(np.asarray(reached, dtype=np.int32), np.asarray(truths, dtype=np.int32))
        self._remember([test.request for test in tested])
        if self._budget and seconds:
            self._budget.observe(seconds)
        self._planned = []

    def _split(self, count: int, total: int) -> list[Draft]:
        """The first ``total`` guesses of the forest, by request; remembers which is whose."""
        nodes = np.arange(count, count + total)
        owners = self.forest.request[nodes]
        order = owners.argsort(kind="stable")
        self._nodes, owners = nodes[order], owners[order]
        self._starts = np.searchsorted(owners, np.arange(count + 1))
        number = np.zeros(count + total, dtype=np.int32)  # of a node in its request's tree
        number[self._nodes] = np.arange(total) - self._starts[owners] + 1
        tokens, parents = self.forest.token[self._nodes], number[self.forest.parent[self._nodes]]
        ends = self._starts.tolist()
        return [Draft(tokens[a:b], parents[a:b]) for a, b in pairwise(ends)]

    def _remember(self, requests: list[Request]) -> None:
        """Learn what follows what in the requests' new tokens, and of requests that ended for others."""
        parts, domains = [], []
        for request in requests:
            if request.finish_reason:
                learns, start, domain = self._sources.traffic, 0, _TRAFFIC
            else:
                learns, start, domain = self._sources.context, request.num_remembered, _OWN + request.key
            if learns:
                first = max(0, start - ORDERS)
                parts.append(windows(request.known_tokens(first, request.num_known), start - first))
                domains.append(np.full(len(parts[-1]), domain))
                request.num_remembered = request.num_known
        if parts:
            self.forest.add(np.concatenate(parts), np.concatenate(domains))


def _roots(requests: list[Request], depths: list[int], sources: Sources) -> Roots:
    shape = next((r.guesses.ids.shape for r in requests if r.guesses), (0, 0))
    none = Guesses(np.full(shape, -1, dtype=np.int32), np.zeros(shape, dtype=np.float32))
    guesses = [r.guesses or none for r in requests]
    traffic = _TRAFFIC if sources.traffic else _UNKNOWN
    return Roots(
        last=np.stack([r.last_tokens(ORDERS) for r in requests]),
        ids=np.stack([g.ids for g in guesses]),
        logits=np.stack([g.logits for g in guesses]),
        depths=np.asarray(depths, dtype=np.int32),
        classes=np.asarray([class_of(r.params) for r in requests], dtype=np.int32),
        factors=np.asarray([r.momentum.factor for r in requests], dtype=np.float32),
        values=np.ones(len(requests), dtype=np.float32),
        domains=np.asarray([(_OWN + r.key, traffic, TEXT) for r in requests], dtype=np.int64),
    )
