"""Candidate trees made anew for every step: the nodes that are likeliest to be accepted, over the whole batch.

The expected number of accepted guesses is the sum over nodes of the probability that all guesses on the way to the node
are right. A child's never exceeds its parent's, so the likeliest nodes of all requests are the best trees, and closed
under ancestors (Medusa paper, section 2.3.3, for one static tree; here with the step's own probabilities). They are
found best first, by ``tree_builder_reference.py`` or, some hundred times as fast, by ``builder.cpp``.

Shape suffixes: B requests, K heads, R ranks, N nodes.
"""

import ctypes
import logging
import sysconfig
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from euryale.scheduler.speculation import tree_builder_reference as tree_builder_reference
from euryale.scheduler.speculation.acceptance_stats import AcceptanceStats
from euryale.scheduler.speculation.ngram_table import NUM_SOURCES, ROW, SUCCESSORS, NgramTable

logger = logging.getLogger("euryale.scheduler")

MAX_RANKS = 32
CHILD = np.dtype(
    [("token", "i4"), ("cell", "i4"), ("acceptance_probability", "f4"), ("probability", "f4"), ("own", "f4")]
)
_REQUESTS = ("last", "ids", "logits", "depths", "classes", "factors", "values", "sources")
_ESTIMATES = ("weights", "ratios", "accepted", "predicted", "context_accepted", "context_cases")
_NODES = dict.fromkeys(("request", "parent", "token", "depth"), np.int32)
_NODES |= dict.fromkeys(("acceptance_probability", "expected_children"), np.float32) | dict.fromkeys(
    ("evidence", "first", "count"), np.int32
)


@dataclass(frozen=True, kw_only=True)
class TreeRoots:
    """Where trees may grow. ``last`` int32 [B, ORDERS]: a request's last tokens, the latest first (-1: none); ``ids``
    int32 and ``logits`` float32 [B, K, R]: what its heads name, likeliest first (ids -1: its heads did not run);
    ``depths`` int32 [B]: of the deepest useful guess; ``classes`` int32 [B]: of the estimates; ``factors`` float32 [B]:
    on probabilities; ``values`` float32 [B]: what a guess of this request is worth beside others'; ``sources`` int64
    [B, NUM_SOURCES]: of its own tokens, of its traffic, and TEXT or another that nothing is known of."""

    last: np.ndarray
    ids: np.ndarray
    logits: np.ndarray
    depths: np.ndarray
    classes: np.ndarray
    factors: np.ndarray
    values: np.ndarray
    sources: np.ndarray


class _Table(ctypes.Structure):
    """``Table`` of builder.h."""

    _fields_ = (("rows", c_void_p), ("text_bits", c_int64), ("live_bits", c_int64))


class _TreeBuilder(ctypes.Structure):
    """``TreeBuilder`` of builder.h."""

    _fields_ = (
        ("table", _Table),
        *((n, c_int64) for n in ("requests", "heads", "ranks", "most", "each")),
        *((n, c_int64) for n in ("num_depths", "rank_classes", "bins", "evidences")),
        ("least", c_float),
        *((name, c_float) for name in tree_builder_reference.CONSTANTS),
        *((name, c_void_p) for name in (*_REQUESTS, *_ESTIMATES, *_NODES, "children")),
    )


class TreeBuilder:
    """Grows the trees of one step after the other. Of the last step's: the arrays ``request``, ``parent`` (-1: none),
    ``token``, ``depth``, int32 [N], ``acceptance_probability`` float32 [N], the probability that all guesses on the way
    are right, and ``expected_children`` float32 [N], the probability that one of the node's children is. The first B
    nodes are the roots."""

    def __init__(self, table: NgramTable, acceptance_probability: AcceptanceStats) -> None:
        self.table, self.estimates = table, acceptance_probability
        self.num_nodes = self.num_children = 0
        self._native = _library()
        self._struct = _TreeBuilder(**tree_builder_reference.CONSTANTS)
        self._struct.table = _Table(table.rows.ctypes.data, table.text_bits, table.live_bits)
        for name in _ESTIMATES:
            setattr(self._struct, name, getattr(acceptance_probability, name).ctypes.data)
        for name in ("num_depths", "rank_classes", "bins", "evidences"):
            setattr(self._struct, name, getattr(acceptance_probability, name))
        self._room(64, 16)

    def grow(self, roots: TreeRoots, most: int, each: int, least: float) -> int:
        """Make the ``most`` likeliest nodes of all trees together, at most ``each`` of one request, none whose
        acceptance_probability times its request's value is below ``least``; likeliest first. Returns how many nodes
        there are, roots included."""
        self.roots = roots
        count, heads, ranks = roots.ids.shape
        assert ranks <= MAX_RANKS, f"{ranks} ranks"
        self._room(count + most, ranks)
        struct = self._struct
        struct.requests, struct.heads, struct.ranks, struct.most, struct.each = count, heads, ranks, most, each
        struct.least = least
        for name in _REQUESTS:
            setattr(struct, name, _address(getattr(roots, name)))
        grow = self._native.tree_builder_grow if self._native else tree_builder_reference.grow
        self.num_nodes = grow(ctypes.byref(struct) if self._native else self)
        return self.num_nodes

    def learn(self, nodes: np.ndarray, tokens: np.ndarray) -> None:
        """Learn from the nodes int32 that were reached, roots included, and the tokens int32 that came after them."""
        if self._native:
            self._native.tree_builder_learn(ctypes.byref(self._struct), len(nodes), _address(nodes), _address(tokens))
        else:
            tree_builder_reference.learn(self, nodes, tokens)

    def add(self, sequences: list[tuple[np.ndarray, int, int]]) -> None:
        """Learn what followed what in some sequences: tokens int32, the place of the first new one, and the source of
        each. Tokens before the first new one, up to ORDERS, say what that follows."""
        if not self._native:
            tree_builder_reference.add(self.table, sequences)
            return
        parts, starts, sources = zip(*sequences, strict=True)
        tokens, lengths = np.concatenate(parts), [len(part) for part in parts]
        numbers = np.asarray((lengths, starts, sources), dtype=np.int64)
        at, step = _address(numbers), numbers.strides[0]
        table = ctypes.byref(self._struct.table)
        self._native.ngrams_add(table, len(sequences), _address(tokens), at, at + step, at + 2 * step)

    def _room(self, nodes: int, ranks: int) -> None:
        """Have memory for so many nodes with that many ranks' guesses below each."""
        if nodes > len(self.__dict__.get("request", ())):
            for name, dtype in _NODES.items():
                setattr(self, name, np.empty(2 * nodes, dtype=dtype))
                setattr(self._struct, name, getattr(self, name).ctypes.data)
        room = len(self.request) * (ranks + NUM_SOURCES * SUCCESSORS)
        if room > len(self.__dict__.get("children", ())):
            self.children = np.empty(room, dtype=CHILD)
            self._struct.children = self.children.ctypes.data


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled half, or None, with a warning, if it was not built here or from other sources."""
    names = (f"_native{sysconfig.get_config_var('EXT_SUFFIX')}", "_native.so")
    found = [path for name in names if (path := Path(__file__).parent / name).is_file()]
    try:
        if not found:
            raise OSError("it was not compiled")
        library = ctypes.CDLL(str(found[0]))
        library.tree_builder_bytes.restype = library.tree_builder_grow.restype = c_int64
        library.tree_builder_learn.argtypes = [c_void_p, c_int64, c_void_p, c_void_p]
        library.ngrams_add.argtypes = [c_void_p, c_int64, *[c_void_p] * 4]
        if library.tree_builder_bytes() != ctypes.sizeof(_TreeBuilder) + CHILD.itemsize + ROW.itemsize:
            raise OSError("it was built from sources with other structs")
    except (OSError, AttributeError) as error:
        logger.warning("trees are planned in Python, far slower (%s): install a C++ compiler and install again", error)
        return None
    return library
