"""Candidate trees made anew for every step: the nodes that are likeliest to be accepted, over the whole batch.

The expected number of accepted draft tokens is the sum over nodes of the probability that all draft tokens on the way
to the node are accepted. A child's never exceeds its parent's, so the likeliest nodes of all requests are the best
trees, and closed under ancestors (Medusa paper, section 2.3.3, for one static tree; here with the step's own
probabilities). They are found best first, by ``tree_builder_reference.py`` or, some hundred times as fast, by
``tree_builder.cpp``.

Shape suffixes: B requests, K heads, R ranks, N nodes.
"""

import ctypes
import logging
import sysconfig
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np

from euryale.scheduler.speculation import tree_builder_reference as reference
from euryale.scheduler.speculation.acceptance_stats import AcceptanceStats
from euryale.scheduler.speculation.constants import (
    FOLD_BITS,
    LIKELY_BINS,
    MAX_RANKS,
    MIX_MULTIPLIER,
    NUM_SOURCES,
    ORDER_OFFSETS,
    ORDERS,
    PLACE_MULTIPLIERS,
    PRODUCT,
    SOURCE_MULTIPLIER,
    SUCCESSORS,
)
from euryale.scheduler.speculation.ngram_table import ROW, NgramTable

logger = logging.getLogger("euryale.scheduler")

# A child that a node may get: ``cell`` of the acceptance statistics, ``acceptance_probability`` of all draft tokens
# down to it, ``probability`` of it alone before calibration, and the part of that which the request's ``context`` says.
CHILD = np.dtype(
    [("token", "i4"), ("cell", "i4"), ("acceptance_probability", "f4"), ("probability", "f4"), ("context", "f4")]
)


@dataclass(frozen=True, kw_only=True)
class TreeRoots:
    """Where trees may grow. ``last`` int32 [B, ORDERS]: a request's last tokens, the latest first (-1: none); ``ids``
    int32 and ``logits`` float32 [B, K, R]: its head candidates, likeliest first (ids -1: its heads did not run);
    ``depths`` int32 [B]: of the deepest useful draft token; ``classes`` int32 [B]: its sampling class; ``factors``
    float32 [B]: on probabilities; ``values`` float32 [B]: what a draft token of this request is worth beside others';
    ``sources`` int64 [B, NUM_SOURCES]: ids of its own tokens, of its traffic, and of the calibration text."""

    last: np.ndarray
    ids: np.ndarray
    logits: np.ndarray
    depths: np.ndarray
    classes: np.ndarray
    factors: np.ndarray
    values: np.ndarray
    sources: np.ndarray


@dataclass(kw_only=True)
class GrownTrees:
    """The trees of one step; valid until their builder grows the next ones. The first B nodes are the roots.

    ``request``, ``parent`` (-1: none), ``token``, ``depth`` int32 [N]; ``acceptance_probability`` float32 [N]: that all
    draft tokens down to the node are accepted; ``expected_children`` float32 [N]: that one of the node's children is,
    if the node is. ``children`` CHILD [...]: those that each node may get, likeliest first; a node's are the ``count``
    ones from ``first`` on, int32 [N], found with ``evidence`` int32 [N] of the context (-1: it was not looked at).
    Arrays may be longer than ``num_nodes``.
    """

    request: np.ndarray
    parent: np.ndarray
    token: np.ndarray
    depth: np.ndarray
    acceptance_probability: np.ndarray
    expected_children: np.ndarray
    evidence: np.ndarray
    first: np.ndarray
    count: np.ndarray
    children: np.ndarray
    roots: TreeRoots | None = None
    num_nodes: int = 0

    @classmethod
    def with_room(cls, num_nodes: int, num_children: int) -> "GrownTrees":
        """Return trees without nodes, with memory for so many."""
        floats = {"acceptance_probability", "expected_children"}
        arrays = {n: np.empty(num_nodes, dtype=np.float32 if n in floats else np.int32) for n in _NODES}
        return cls(**arrays, children=np.empty(num_children, dtype=CHILD))


_ROOTS = tuple(f.name for f in fields(TreeRoots))
_NODES = tuple(f.name for f in fields(GrownTrees) if f.name not in ("children", "roots", "num_nodes"))
_STATS = ("weights", "ratios", "accepted", "predicted", "context_accepted", "context_cases")


class _Table(ctypes.Structure):
    """``Table`` of tree_builder.h."""

    _fields_ = (("rows", c_void_p), ("text_bits", c_int64), ("live_bits", c_int64))


class _Arguments(ctypes.Structure):
    """``Arguments`` of tree_builder.h."""

    _fields_ = (
        ("table", _Table),
        *((n, c_int64) for n in ("requests", "heads", "ranks", "max_draft_tokens", "max_per_request")),
        *((n, c_int64) for n in ("num_depths", "rank_classes", "bins", "evidences")),
        ("min_probability", c_float),
        *((name, c_float) for name in PRODUCT),
        *((name, c_void_p) for name in (*_ROOTS, *_STATS, *_NODES, "children")),
    )


class TreeBuilder:
    """Grows the trees of one step after the other from n-grams and acceptance statistics, and learns from what came."""

    def __init__(self, table: NgramTable, stats: AcceptanceStats) -> None:
        """Both are changed by ``learn`` and ``add``."""
        self.table, self.stats = table, stats
        self._native = _library()
        self._trees = GrownTrees.with_room(0, 0)
        self._arguments = _Arguments(**PRODUCT)
        self._arguments.table = _Table(table.rows.ctypes.data, table.text_bits, table.live_bits)
        for name in _STATS:
            setattr(self._arguments, name, _address(getattr(stats, name)))
        for name in ("num_depths", "rank_classes", "bins", "evidences"):
            setattr(self._arguments, name, getattr(stats, name))

    def grow(self, roots: TreeRoots, max_draft_tokens: int, max_per_request: int, min_probability: float) -> GrownTrees:
        """Return the trees of the ``max_draft_tokens`` likeliest nodes, likeliest first: at most ``max_per_request`` of
        one request, none whose acceptance probability times its request's value is below ``min_probability``."""
        count, heads, ranks = roots.ids.shape
        assert ranks <= MAX_RANKS, f"{ranks} ranks"
        trees = self._room_for(count + max_draft_tokens, ranks)
        trees.roots = roots
        if self._native is None:
            reference.grow(self.table, self.stats, trees, max_draft_tokens, max_per_request, min_probability)
            return trees
        a = self._arguments
        a.requests, a.heads, a.ranks = count, heads, ranks
        a.max_draft_tokens, a.max_per_request, a.min_probability = max_draft_tokens, max_per_request, min_probability
        for name in _ROOTS:
            setattr(a, name, _address(getattr(roots, name)))
        trees.num_nodes = self._native.tree_builder_grow(ctypes.byref(a))
        return trees

    def learn(self, trees: GrownTrees, nodes: np.ndarray, tokens: np.ndarray) -> None:
        """Learn from the ``nodes`` int32 [M] of the latest ``trees`` that were reached, roots included, and the
        ``tokens`` int32 [M] that came after them."""
        if self._native is None:
            reference.learn(self.stats, trees, nodes, tokens)
            return
        assert trees is self._trees, "trees of an earlier step"
        self._native.tree_builder_learn(ctypes.byref(self._arguments), len(nodes), _address(nodes), _address(tokens))

    def add(self, sequences: list[tuple[np.ndarray, int, int]]) -> None:
        """Learn what followed what in some sequences, each given as its tokens int32, the index of the first new one,
        and the id of its source. Tokens before the first new one, up to ORDERS, are its context."""
        if self._native is None:
            reference.add(self.table, sequences)
            return
        parts, starts, sources = zip(*sequences, strict=True)
        tokens, lengths = np.concatenate(parts), [len(part) for part in parts]
        numbers = np.asarray((lengths, starts, sources), dtype=np.int64)
        at, step = _address(numbers), numbers.strides[0]
        table = ctypes.byref(self._arguments.table)
        self._native.ngrams_add(table, len(sequences), _address(tokens), at, at + step, at + 2 * step)

    def _room_for(self, num_nodes: int, ranks: int) -> GrownTrees:
        """Return trees with memory for so many nodes with that many head candidates below each."""
        trees, num_children = self._trees, num_nodes * (ranks + NUM_SOURCES * SUCCESSORS)
        if num_nodes > len(trees.request) or num_children > len(trees.children):
            num_nodes = max(2 * num_nodes, len(trees.request))
            trees = self._trees = GrownTrees.with_room(num_nodes, max(2 * num_children, len(trees.children)))
            for name in (*_NODES, "children"):
                setattr(self._arguments, name, _address(getattr(trees, name)))
        return trees


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _constants() -> np.ndarray:
    """The constants that tree_builder.cpp repeats, uint64, in its order."""
    multipliers = [*PLACE_MULTIPLIERS.tolist(), *ORDER_OFFSETS.tolist(), int(SOURCE_MULTIPLIER), int(MIX_MULTIPLIER)]
    sizes = [ORDERS, SUCCESSORS, NUM_SOURCES, MAX_RANKS, LIKELY_BINS, int(FOLD_BITS)]
    structs = [ctypes.sizeof(_Arguments), CHILD.itemsize, ROW.itemsize]
    return np.array([*multipliers, *sizes, *structs], dtype=np.uint64)


@cache
def _library() -> ctypes.CDLL | None:
    """Load the compiled half; None, with a warning, if it was not built here or from other sources."""
    names = (f"_native{sysconfig.get_config_var('EXT_SUFFIX')}", "_native.so")
    found = [path for name in names if (path := Path(__file__).parent / name).is_file()]
    try:
        if not found:
            raise OSError("it was not compiled")
        library = ctypes.CDLL(str(found[0]))
        library.tree_builder_grow.restype = c_int64
        library.tree_builder_learn.argtypes = [c_void_p, c_int64, c_void_p, c_void_p]
        library.ngrams_add.argtypes = [c_void_p, c_int64, *[c_void_p] * 4]
        constants = _constants()
        library.tree_builder_matches.argtypes = [c_void_p, c_int64]
        if not library.tree_builder_matches(_address(constants), len(constants)):
            raise OSError("it was built from other sources")
    except (OSError, AttributeError) as error:
        logger.warning("trees are planned in Python, far slower (%s): install a C++ compiler and install again", error)
        return None
    return library
