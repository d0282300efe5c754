"""Shapes of draft trees, and the ``--tree`` option.

Node 0 of a tree is the root, the last known token. Every other node is a draft token. Its path of ranks identifies
it, as in the ``medusa_choices`` format: path [0, 2] is the third likeliest token of the second head, below the
likeliest token of the first. This file knows neither probabilities of running requests nor tensors.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from euryale.client.rules import list_of, shown, whole
from euryale.scheduler import json_file

MAX_NODES = 128  # with the root: two words of ancestor bits
_PATH = list_of(
    whole(0, 2**31 - 2), MAX_NODES - 1, least=1
)  # a list of ranks; rank + 1, the number of candidates, fits int32
DYNAMIC_DEPTH = 12  # maximum depth of dynamic trees; below the heads they use n-grams
DYNAMIC_CANDIDATES = 10  # candidates of each head for dynamic trees

# Accuracy by head and rank where nothing was measured: rounded from the accuracies published for heads on 7B to 33B
# chat models. Only the order of the products matters.
_GENERIC_TOP1 = (0.62, 0.42, 0.31, 0.25, 0.21)
_GENERIC_RANK_FALL = 0.45


@dataclass(frozen=True)
class TreeShape:
    """A static tree with N nodes.

    ``parents`` int32 [N], with parents[0] = -1 and parents[i] < i, so that any prefix of the nodes is a tree too.
    ``ranks`` int32 [N]: the rank of each draft token among its head's candidates (root: -1).
    """

    parents: np.ndarray
    ranks: np.ndarray

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> "TreeShape":
        """Return the tree of ``medusa_choices``. Missing prefixes of a path are added before it.

        Raises ValueError for an empty or repeated path, a rank that is not an integer >= 0, or too many nodes.
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
        """Depth of every node, int32 [N]; the root has depth 0."""
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
        """Depth of the deepest node."""
        return int(self.depths.max())

    @cached_property
    def num_candidates(self) -> int:
        """Candidates of each head that the tree uses."""
        return int(self.ranks.max()) + 1

    def limited(self, num_draft_tokens: int, depth: int) -> "TreeShape":
        """Return the tree of the first ``num_draft_tokens`` draft tokens that are no deeper than ``depth``."""
        if num_draft_tokens >= self.num_draft_tokens and depth >= self.depth:
            return self
        keep = np.flatnonzero(self.depths <= depth)[: max(num_draft_tokens, 0) + 1]
        renumbered = np.full(len(self.parents), -1, dtype=np.int32)
        renumbered[keep] = np.arange(len(keep), dtype=np.int32)
        parents = np.where(self.parents[keep] < 0, -1, renumbered[self.parents[keep]]).astype(np.int32)
        return TreeShape(parents, self.ranks[keep])

    def tokens(self, candidates: np.ndarray) -> np.ndarray:
        """Return the draft tokens int32 [N - 1] from the head candidates ``candidates`` int [heads, k]."""
        return candidates[self._places].astype(np.int32, copy=False)

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Head and rank of every draft token, int32 [N - 1] each."""
        return self.depths[1:] - 1, self.ranks[1:]

    def paths(self) -> list[list[int]]:
        """Return the tree in the ``medusa_choices`` format."""
        paths: list[list[int]] = [[]]
        for node in range(1, len(self.parents)):
            paths.append([*paths[self.parents[node]], int(self.ranks[node])])
        return paths[1:]


def search_tree(accuracy: np.ndarray, num_draft_tokens: int) -> TreeShape:
    """Return the static tree of ``num_draft_tokens`` draft tokens with the highest expected acceptance length.

    Heads are taken as independent (Medusa paper, section 2.3.3): paths are added greedily by the product of their
    accuracies. ``accuracy`` float [heads, ranks]: probability that the head's candidate of that rank is correct.
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
    """Return a static tree for heads of unknown accuracy."""
    top1 = np.asarray([_GENERIC_TOP1[min(h, len(_GENERIC_TOP1) - 1)] for h in range(num_heads)])
    ranks = np.arange(8)
    # The fraction that a rank has of what the ranks above it leave.
    fall = _GENERIC_RANK_FALL * (1 - _GENERIC_RANK_FALL) ** np.maximum(ranks - 1, 0) / 1.5
    accuracy = np.where(ranks == 0, top1[:, None], (1 - top1[:, None]) * fall)
    return search_tree(accuracy, num_draft_tokens)


def chain(num_heads: int) -> TreeShape:
    """Return the tree with the likeliest candidate of every head, as a chain."""
    return TreeShape.from_paths([(0,) * depth for depth in range(1, num_heads + 1)])


@dataclass(frozen=True, kw_only=True)
class TreeConfig:
    """Which trees an engine uses: static ones of one ``shape``, or dynamic ones if ``shape`` is None.

    ``dynamic_size``: draft tokens of each request's dynamic tree; 0 leaves the number to the budget.
    """

    shape: TreeShape | None = None
    dynamic_size: int = 0

    @property
    def depth(self) -> int:
        """Maximum depth of a draft token."""
        return self.shape.depth if self.shape else DYNAMIC_DEPTH

    @property
    def num_candidates(self) -> int:
        """Candidates of each head that trees use."""
        return self.shape.num_candidates if self.shape else DYNAMIC_CANDIDATES

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens of a tree of full size; 0 if the budget decides."""
        return self.shape.num_draft_tokens if self.shape else self.dynamic_size

    def __str__(self) -> str:
        return str(self.shape.paths()) if self.shape else f"dynamic:{self.dynamic_size}"


def parse_tree_option(text: str, heads_tree: Path | None, num_heads: int) -> TreeConfig:
    """Return the trees that ``--tree`` asks for.

    ``text`` is "dynamic" (also if empty), "dynamic:16", "chain", "static:FILE", a bare file name, or "static". The last
    one is ``heads_tree``, the tree file that came with the heads, or a generic tree if that is None. Raises ValueError
    for anything else."""
    kind, _, rest = text.partition(":")
    if kind in ("", "dynamic"):
        size = rest if ":" in text else "0"
        if not size.isdecimal() or (":" in text and not 1 <= int(size) < MAX_NODES):
            raise ValueError(
                f"--tree {text}: give dynamic:1 to dynamic:{MAX_NODES - 1}, the draft tokens of each request"
            )
        return TreeConfig(dynamic_size=int(size))
    if text == "chain":
        return TreeConfig(shape=chain(num_heads))
    if text == "static":
        return TreeConfig(shape=load_tree(heads_tree, num_heads) if heads_tree else default_tree(num_heads))
    return TreeConfig(shape=load_tree(rest if kind == "static" else text, num_heads))


def load_tree(source: str | Path, num_heads: int) -> TreeShape:
    """Return the tree in the JSON file ``source``, a list of paths.

    Raises ValueError if the file is not such a list, or if the tree is deeper than ``num_heads``.
    """
    paths = json_file.read(source, "give --tree dynamic, dynamic:N, static:FILE, chain or off")
    if not isinstance(paths, list) or not paths:
        raise ValueError(f"{source} must be a JSON list of paths such as [[0], [1], [0, 0]], not {shown(paths)}")
    try:
        shape = TreeShape.from_paths(paths)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if shape.depth > num_heads:
        raise ValueError(f"the tree {source} has depth {shape.depth} but there are {num_heads} Medusa heads: prune it")
    return shape
