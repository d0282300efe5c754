"""Candidate trees: which guesses of the Medusa heads are verified together.

A *node* is a position in the tree; node 0 is the root, the last sampled token. Every other node is one guess,
named by its path of ranks as in the ``medusa_choices`` format: path [0, 2] is the third likeliest token of the
second head below the likeliest token of the first. This file knows shapes only; it never sees a probability of
a running request, nor a tensor.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from euryale.client.rules import list_of, shown, whole
from euryale.scheduler import json_file

MAX_NODES = 128  # root included: two words of ancestor bits
_PATH = list_of(whole(0, 2**31 - 2), MAX_NODES - 1, least=1)  # ranks; int32, and one more is the number of candidates
DYNAMIC_DEPTH = 12  # of trees made for each step: below the heads they go on with what followed before
DYNAMIC_CANDIDATES = 10  # of each head that such trees see

# AcceptanceStats of a guess by head and rank where nothing was measured: the shape of the accuracies published for
# heads on 7B to 33B chat models, rounded. Only the order of the products matters.
_GENERIC_TOP1 = (0.62, 0.42, 0.31, 0.25, 0.21)
_GENERIC_RANK_FALL = 0.45


@dataclass(frozen=True)
class TreeShape:
    """A static tree. ``parents`` [nodes] int32 with parents[0] = -1 and parents[i] < i; ``ranks`` [nodes] int32,
    the rank of each guess among its head's candidates (root: -1). Any prefix of the nodes is a tree too."""

    parents: np.ndarray
    ranks: np.ndarray

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> "TreeShape":
        """Build from ``medusa_choices``. Prefixes that are not listed are added before their first descendant.

        Raises ValueError for an empty or repeated path, a rank that is not a whole number >= 0, or too many nodes.
        """
        index: dict[tuple[int, ...], int] = {(): 0}
        listed: set[tuple[int, ...]] = set()
        for path in paths:
            if not _PATH.fits(path):
                raise ValueError(f"a tree path must be {_PATH.says}, not {shown(path)}")
            if tuple(path) in listed:
                raise ValueError(f"the tree lists path {list(path)} twice: remove one")
            listed.add(tuple(path))
            for depth in range(1, len(path) + 1):
                index.setdefault(tuple(path[:depth]), len(index))
            if len(index) > MAX_NODES:
                raise ValueError(f"the tree has more than {MAX_NODES} nodes with its root: prune it")
        parents = [-1] + [index[path[:-1]] for path in index if path]
        ranks = [-1] + [path[-1] for path in index if path]
        return cls(np.asarray(parents, dtype=np.int32), np.asarray(ranks, dtype=np.int32))

    @cached_property
    def depths(self) -> np.ndarray:
        """Depth of every node, int32 [nodes]; the root's is 0."""
        depths = np.zeros(len(self.parents), dtype=np.int32)
        for node in range(1, len(depths)):
            depths[node] = depths[self.parents[node]] + 1
        return depths

    @property
    def num_draft_tokens(self) -> int:
        """Nodes without the root."""
        return len(self.parents) - 1

    @cached_property
    def depth(self) -> int:
        return int(self.depths.max())

    @cached_property
    def num_candidates(self) -> int:
        """How many of each head's likeliest tokens the tree can ask for."""
        return int(self.ranks.max()) + 1

    def limited(self, num_draft_tokens: int, depth: int) -> "TreeShape":
        """The first ``num_draft_tokens`` guesses no deeper than ``depth``; still closed under ancestors."""
        if num_draft_tokens >= self.num_draft_tokens and depth >= self.depth:
            return self
        keep = np.flatnonzero(self.depths <= depth)[: max(num_draft_tokens, 0) + 1]
        renumbered = np.full(len(self.parents), -1, dtype=np.int32)
        renumbered[keep] = np.arange(len(keep), dtype=np.int32)
        parents = np.where(self.parents[keep] < 0, -1, renumbered[self.parents[keep]]).astype(np.int32)
        return TreeShape(parents, self.ranks[keep])

    def tokens(self, candidates: np.ndarray) -> np.ndarray:
        """Token ids of the guesses (without the root), int32 [nodes - 1], from ``candidates`` [heads, k]."""
        return candidates[self._places].astype(np.int32, copy=False)

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Head and rank of every guess."""
        return self.depths[1:] - 1, self.ranks[1:]

    def paths(self) -> list[list[int]]:
        """The tree in the ``medusa_choices`` format."""
        paths: list[list[int]] = [[]]
        for node in range(1, len(self.parents)):
            paths.append([*paths[self.parents[node]], int(self.ranks[node])])
        return paths[1:]


def search_tree(accuracy: np.ndarray, num_draft_tokens: int) -> TreeShape:
    """The static tree of ``num_draft_tokens`` guesses that maximises the expected accepted length if heads were
    independent (Medusa paper, section 2.3.3): greedily the largest products along paths.

    ``accuracy`` [heads, ranks]: probability that the head's guess of that rank is right.
    """
    num_heads, num_ranks = accuracy.shape
    heap: list[tuple[float, tuple[int, ...]]] = [(-float(accuracy[0, rank]), (rank,)) for rank in range(num_ranks)]
    heapq.heapify(heap)
    paths: list[tuple[int, ...]] = []
    while heap and len(paths) < num_draft_tokens:
        negative, path = heapq.heappop(heap)
        paths.append(path)
        if len(path) < num_heads:
            for rank in range(num_ranks):
                heapq.heappush(heap, (negative * float(accuracy[len(path), rank]), (*path, rank)))
    return TreeShape.from_paths(paths)


def default_tree(num_heads: int, num_draft_tokens: int = 15) -> TreeShape:
    """A tree for heads nothing is known of."""
    top1 = np.asarray([_GENERIC_TOP1[min(h, len(_GENERIC_TOP1) - 1)] for h in range(num_heads)])
    ranks = np.arange(8)
    # A rank's share of what the ranks above it left over.
    fall = _GENERIC_RANK_FALL * (1 - _GENERIC_RANK_FALL) ** np.maximum(ranks - 1, 0) / 1.5
    accuracy = np.where(ranks == 0, top1[:, None], (1 - top1[:, None]) * fall)
    return search_tree(accuracy, num_draft_tokens)


def chain(num_heads: int) -> TreeShape:
    """The likeliest guess of every head, one below the other."""
    return TreeShape.from_paths([(0,) * depth for depth in range(1, num_heads + 1)])


@dataclass(frozen=True, kw_only=True)
class TreeChoice:
    """Static trees of one ``shape``, or, where that is None, dynamic ones: of ``nodes`` guesses for each request, or of
    as many as pay (0)."""

    shape: TreeShape | None = None
    nodes: int = 0

    @property
    def depth(self) -> int:
        """Of the deepest guess."""
        return self.shape.depth if self.shape else DYNAMIC_DEPTH

    @property
    def num_candidates(self) -> int:
        """How many of each head's likeliest tokens are looked at."""
        return self.shape.num_candidates if self.shape else DYNAMIC_CANDIDATES

    @property
    def most_nodes(self) -> int:
        """Guesses that one request gets in any case."""
        return self.shape.num_draft_tokens if self.shape else self.nodes

    def __str__(self) -> str:
        return str(self.shape.paths()) if self.shape else f"dynamic:{self.nodes}"


def choose_trees(text: str, beside: Path | None, num_heads: int) -> TreeChoice:
    """What ``--tree`` asks for: "dynamic" (also if empty), "dynamic:16", "chain", "static:FILE" or the bare file name,
    or "static" for the tree ``beside`` the heads, or a generic one if there is none. ValueError for anything else."""
    kind, _, rest = text.partition(":")
    if kind in ("", "dynamic"):
        nodes = rest if ":" in text else "0"
        if not nodes.isdecimal() or (":" in text and not 1 <= int(nodes) < MAX_NODES):
            raise ValueError(f"--tree {text}: give the guesses of each request, dynamic:1 to dynamic:{MAX_NODES - 1}")
        return TreeChoice(nodes=int(nodes))
    if text == "chain":
        return TreeChoice(shape=chain(num_heads))
    if text == "static":
        return TreeChoice(shape=load_tree(beside, num_heads) if beside else default_tree(num_heads))
    return TreeChoice(shape=load_tree(rest if kind == "static" else text, num_heads))


def load_tree(source: str | Path, num_heads: int) -> TreeShape:
    """The tree in a JSON file of paths.

    Raises ValueError if the file is not such a tree or is deeper than there are heads.
    """
    paths = json_file.read(source, "give --tree dynamic, dynamic:N, static:FILE, chain or off")
    if not isinstance(paths, list) or not paths:
        raise ValueError(f"{source} must be a JSON list of paths such as [[0], [1], [0, 0]], not {shown(paths)}")
    try:
        shape = TreeShape.from_paths(paths)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if shape.depth > num_heads:
        raise ValueError(f"the tree {source} is {shape.depth} deep but there are {num_heads} Medusa heads: prune it")
    return shape
