"""Builds dynamic trees: the draft tokens of the whole batch that are likeliest to be accepted.

A node's acceptance probability is the probability that all draft tokens on its path are accepted. The sum over all
nodes is the expected number of accepted draft tokens. A child's probability never exceeds its parent's, so the
likeliest nodes of all requests form the best trees. (Medusa paper, section 2.3.3, does this for one static tree; here
each step has its own probabilities.) The search is best first, in ``tree_builder_reference.py`` or, some hundred times
as fast, in ``tree_builder.cpp``.

Shape suffixes: B requests, K heads, R ranks, N nodes.
"""

import ctypes
import logging
import sysconfig
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

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

# A possible child of a node: its ``cell`` in the acceptance statistics, its ``acceptance_probability``, its
# uncalibrated ``probability`` below its parent, and the part of this that comes from the request's own ``context``.
CHILD = np.dtype(
    [("token", "i4"), ("cell", "i4"), ("acceptance_probability", "f4"), ("probability", "f4"), ("context", "f4")]
)


@dataclass(frozen=True, kw_only=True)
class TreeRoots:
    """The requests for which trees are grown, one root each.

    * ``last`` int32 [B, ORDERS]: last tokens, latest first, padded with -1.
    * ``ids`` int32 [B, K, R], ``logits`` float32 [B, K, R]: head candidates, likeliest first; ids of -1 if the heads
      did not run.
    * ``depths`` int32 [B]: maximum depth of a draft token.
    * ``classes`` int32 [B]: sampling class.
    * ``factors`` float32 [B]: acceptance-rate correction.
    * ``values`` float32 [B]: value of a draft token of the request, relative to other requests.
    * ``sources`` int64 [B, NUM_SOURCES]: source ids of its own tokens, its traffic, and the calibration text.
    """

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
    """The trees of one step, valid until their builder grows the next ones. The first B nodes are the roots.

    * ``request``, ``parent`` (-1: none), ``token``, ``depth``: int32 [N].
    * ``acceptance_probability`` float32 [N]: that all draft tokens on the node's path are accepted.
    * ``expected_children`` float32 [N]: probability that one of the node's children is accepted, if the node is.
    * ``children`` CHILD [...]: possible children, likeliest first. Those of a node are the ``count`` int32 [N] ones
      from ``first`` int32 [N] on.
    * ``evidence`` int32 [N]: evidence class of the context with which the children were found (-1: not searched).

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
        """Return empty trees with memory for so many nodes and children."""
        floats = {"acceptance_probability", "expected_children"}
        arrays: dict[str, Any] = {
            name: np.empty(num_nodes, dtype=np.float32 if name in floats else np.int32) for name in _NODES
        }
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
        *((n, c_int64) for n in ("num_depths", "rank_classes", "bins", "num_evidence_classes")),
        ("min_probability", c_float),
        *((name, c_float) for name in PRODUCT),
        *((name, c_void_p) for name in (*_ROOTS, *_STATS, *_NODES, "children")),
    )


class TreeBuilder:
    """Grows the trees of each step from head candidates, n-grams and acceptance statistics, and updates the latter."""

    def __init__(self, table: NgramTable, stats: AcceptanceStats) -> None:
        """``add`` changes ``table``, and ``learn`` changes ``stats``."""
        self.table, self.stats = table, stats
        self._native = _library()
        self._trees = GrownTrees.with_room(0, 0)
        self._arguments = _Arguments(**PRODUCT)
        self._arguments.table = _Table(table.rows.ctypes.data, table.text_bits, table.live_bits)
        for name in _STATS:
            setattr(self._arguments, name, _address(getattr(stats, name)))
        for name in ("num_depths", "rank_classes", "bins", "num_evidence_classes"):
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
        """Update the acceptance statistics after a step.

        ``nodes`` int32 [M]: accepted nodes of the latest ``trees``, and roots. ``tokens`` int32 [M]: the tokens that
        were emitted after them."""
        if self._native is None:
            reference.learn(self.stats, trees, nodes, tokens)
            return
        assert trees is self._trees, "trees of an earlier step"
        self._native.tree_builder_learn(ctypes.byref(self._arguments), len(nodes), _address(nodes), _address(tokens))

    def add(self, sequences: list[tuple[np.ndarray, int, int]]) -> None:
        """Add sequences to the n-gram table.

        A sequence is its tokens int32 [T], the index of the first new one, and the id of its source. Up to ORDERS
        tokens before the first new one serve as its context."""
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
        """Return trees with memory for ``num_nodes`` nodes and ``ranks`` head candidates below each."""
        trees, num_children = self._trees, num_nodes * (ranks + NUM_SOURCES * SUCCESSORS)
        if num_nodes > len(trees.request) or num_children > len(trees.children):
            num_nodes = max(2 * num_nodes, len(trees.request))
            trees = self._trees = GrownTrees.with_room(num_nodes, max(2 * num_children, len(trees.children)))
            for name in (*_NODES, "children"):
                setattr(self._arguments, name, _address(getattr(trees, name)))
        return trees


def _address(array: np.ndarray) -> int:
    """Return the address of the array's data; faster than ``array.ctypes``."""
    address: int = array.__array_interface__["data"][0]
    return address


def _constants() -> np.ndarray:
    """Return the constants that tree_builder.cpp repeats, uint64, in its order."""
    multipliers = [*PLACE_MULTIPLIERS.tolist(), *ORDER_OFFSETS.tolist(), int(SOURCE_MULTIPLIER), int(MIX_MULTIPLIER)]
    sizes = [ORDERS, SUCCESSORS, NUM_SOURCES, MAX_RANKS, LIKELY_BINS, int(FOLD_BITS)]
    structs = [ctypes.sizeof(_Arguments), CHILD.itemsize, ROW.itemsize]
    return np.array([*multipliers, *sizes, *structs], dtype=np.uint64)


@cache
def _library() -> ctypes.CDLL | None:
    """Load the compiled library; return None, with a warning, if it is missing or was built from other sources."""
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
        logger.warning(
            "trees are built in Python, which is about a hundred times slower (%s): install a C++ compiler and run "
            "`pip install -e .`",
            error,
        )
        return None
    return library
