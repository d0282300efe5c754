"""The tree builder in plain Python: the reference for ``tree_builder.cpp``.

A Medusa head proposes tokens for its depth without knowing the tokens above. N-grams make up for that. The probability
of a draft token below a node is a mixture of two estimates:

* A product of experts: the head's probability among its candidates, times a power of the *prior*. The prior is how
  often the token followed its context in recent traffic and calibration text. The product is normalised over all tokens
  that the head or any source proposes.
* How often the token followed its context in the request's own prompt and output, in the last few cases. The weight of
  this estimate is learned by the length of the context and the number of cases.

The mixture is then calibrated by the acceptance statistics and by the request's acceptance-rate correction. Below the
deepest head, the trees use n-grams only.
"""

import heapq
import math
from typing import TYPE_CHECKING

import numpy as np

from euryale.scheduler.speculation.acceptance_stats import AcceptanceStats
from euryale.scheduler.speculation.constants import (
    LIKELY_BINS,
    NUM_SOURCES,
    ORDERS,
    PRODUCT,
    SUCCESSORS,
    TEXT_SOURCE,
    WINDOW,
)
from euryale.scheduler.speculation.ngram_table import NgramTable, keys_of

if TYPE_CHECKING:
    from euryale.scheduler.speculation.tree_builder import GrownTrees

_CONTEXT, _TRAFFIC, _TEXT = range(NUM_SOURCES)


def find(table: NgramTable, last: np.ndarray, source: int) -> tuple[dict[int, float], int, int]:
    """Look up the longest known context in ``last`` int32 [ORDERS], the last tokens, latest first.

    Returns the fraction of each successor, the evidence class (see ``AcceptanceStats``) and the number of cases; all
    are empty or 0 if no context is known."""
    keys = keys_of(last[None], np.asarray([source]))[0]
    rows = table.rows_of(keys, source == TEXT_SOURCE)
    for order in reversed(range(ORDERS)):
        row = table.rows[rows[order]]
        if last[order] < 0 or row["fingerprint"] != keys[order].astype(np.uint32) or not row["total"]:
            continue
        cases = min(int(row["total"]), SUCCESSORS)
        fractions: dict[int, float] = {}
        for i, token in enumerate(row["successors"][:cases].tolist()):
            fraction = int(row["fractions"][i]) / 65535 if source == TEXT_SOURCE else 1 / cases
            fractions[token] = fractions.get(token, 0.0) + fraction
        return fractions, order * SUCCESSORS + cases, cases
    return {}, 0, 0


class _Growth:
    """The state of growing the trees of one step."""

    def __init__(self, table: NgramTable, stats: AcceptanceStats, trees: "GrownTrees", min_probability: float) -> None:
        assert trees.roots is not None
        self.table, self.stats, self.trees, self.roots = table, stats, trees, trees.roots
        self.min_probability = min_probability
        self.lasts: list[np.ndarray] = []  # last tokens of every node, latest first
        self.heap: list[tuple[float, int, int]] = []  # negative value, node, index among the node's children
        self.num_children = 0

    def add(self, request: int, parent: int, token: int, probability: float) -> None:
        """Append a node with this acceptance probability; ``parent`` -1 makes a root."""
        t, node = self.trees, len(self.lasts)
        before = self.roots.last[request] if parent < 0 else [token, *self.lasts[parent][: ORDERS - 1]]
        self.lasts.append(np.asarray(before, dtype=np.int32))
        t.request[node], t.parent[node], t.token[node] = request, parent, token
        t.acceptance_probability[node], t.depth[node] = probability, 0 if parent < 0 else t.depth[parent] + 1
        t.expected_children[node], t.evidence[node], t.first[node], t.count[node] = 0, -1, self.num_children, 0

    def push_child(self, node: int, index: int) -> None:
        """Push a possible child of the node onto the heap, if it is likely enough."""
        t = self.trees
        if index < t.count[node]:
            probability = float(t.children["acceptance_probability"][t.first[node] + index])
            value = probability * float(self.roots.values[t.request[node]])
            if value >= self.min_probability:
                heapq.heappush(self.heap, (-value, node, index))

    def expand(self, node: int) -> None:
        """Find the possible children of a node, if it may have any."""
        t = self.trees
        value = float(t.acceptance_probability[node]) * float(self.roots.values[t.request[node]])
        if t.depth[node] < self.roots.depths[t.request[node]] and value >= self.min_probability:
            self.write_children(node)
            self.push_child(node, 0)

    def write_children(self, node: int) -> None:
        """Write the possible children of a node, likeliest first."""
        t, stats, roots, c = self.trees, self.stats, self.roots, PRODUCT
        request, depth = int(t.request[node]), int(t.depth[node])
        known = [find(self.table, self.lasts[node], int(source)) for source in roots.sources[request]]
        heads = self.head_log_probabilities(request, depth)
        tokens = list(dict.fromkeys([*heads, *(token for fractions, _, _ in known for token in fractions)]))
        products = self.products(tokens, heads, known)
        total, sampling_class = sum(products) + c["other_mass"], int(roots.classes[request])
        weight = float(stats.weights[sampling_class, known[_CONTEXT][1]])
        t.evidence[node], t.first[node] = known[_CONTEXT][1], self.num_children
        for i, token in enumerate(tokens):
            context = weight * known[_CONTEXT][0].get(token, 0)
            probability = np.float32(context + (1 - weight) * products[i] / total)
            if probability < c["min_child_probability"]:
                continue
            rank = min(i, 2) if token in heads else 3
            cell = (sampling_class, min(depth, stats.num_depths - 1), rank, bin_of(probability, stats.bins))
            alone = min(probability * stats.ratios[cell] * roots.factors[request], np.float32(c["max_probability"]))
            flat = np.ravel_multi_index(cell, stats.ratios.shape)
            child = (token, flat, t.acceptance_probability[node] * alone, probability, context)
            t.children[self.num_children] = child
            self.num_children += 1
        own = t.children[t.first[node] : self.num_children]
        own[:] = own[np.argsort(-own["acceptance_probability"], kind="stable")]
        t.count[node] = len(own)

    def head_log_probabilities(self, request: int, depth: int) -> dict[int, float]:
        """Return the head candidates of this depth with their log-probabilities, normalised among themselves."""
        roots = self.roots
        if depth >= roots.ids.shape[1] or roots.ids[request, depth, 0] < 0:
            return {}
        logits = roots.logits[request, depth].astype(np.float64)
        logs = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        return dict(zip(roots.ids[request, depth].tolist(), logs.tolist(), strict=True))

    def products(
        self, tokens: list[int], heads: dict[int, float], known: list[tuple[dict[int, float], int, int]]
    ) -> list[float]:
        """Return the unnormalised product of experts for each of ``tokens``.

        ``heads``: log-probabilities of the head candidates; ``known``: ``find`` for each source."""
        c, traffic, text = PRODUCT, known[_TRAFFIC], known[_TEXT]
        outsider = min(heads.values(), default=0) - c["outsider_nats"]
        weight = traffic[2] / (traffic[2] + c["text_cases"] * (text[2] > 0) + 1e-6)  # of traffic beside text
        products = []
        for token in tokens:
            prior = weight * traffic[0].get(token, 0) + (1 - weight) * text[0].get(token, 0) + c["prior_floor"]
            head = math.exp(c["head_power"] * heads.get(token, outsider))
            products.append(prior ** c["prior_power"] * head if heads else prior)
        return products


def grow(
    table: NgramTable,
    stats: AcceptanceStats,
    trees: "GrownTrees",
    max_draft_tokens: int,
    max_per_request: int,
    min_probability: float,
) -> None:
    """See ``TreeBuilder.grow``; writes to ``trees``, whose ``roots`` are given."""
    growth = _Growth(table, stats, trees, min_probability)
    num_roots = len(growth.roots.last)
    for request, last in enumerate(growth.roots.last):
        growth.add(request, -1, last[0], 1.0)
    for request in range(num_roots):
        growth.expand(request)
    taken = [0] * num_roots
    while growth.heap and len(growth.lasts) < num_roots + max_draft_tokens:
        _, parent, index = heapq.heappop(growth.heap)
        request = int(trees.request[parent])
        if taken[request] == max_per_request:
            continue
        taken[request] += 1
        child = trees.children[trees.first[parent] + index]
        probability = child["acceptance_probability"]
        trees.expected_children[parent] += probability / trees.acceptance_probability[parent]
        growth.add(request, parent, int(child["token"]), float(probability))
        growth.push_child(parent, index + 1)
        growth.expand(len(growth.lasts) - 1)
    trees.num_nodes = len(growth.lasts)


def bin_of(probability: np.float32, bins: int) -> int:
    """Return the bin of a probability in the acceptance statistics.

    The bin is its exponent and first bit of the mantissa if it is below 1/2, else those of its distance to 1."""
    unlikely = bins - LIKELY_BINS
    if probability < 0.5:
        return max(unlikely - 1 - _half_octaves(probability), 0)
    return unlikely + min(max(_half_octaves(np.float32(1) - probability), 0), LIKELY_BINS - 1)


def _half_octaves(fraction: np.float32) -> int:
    """Return how many half octaves a fraction lies below 1/2."""
    return 251 - (int(np.float32(fraction).view(np.int32)) >> 22)


def learn(stats: AcceptanceStats, trees: "GrownTrees", nodes: np.ndarray, tokens: np.ndarray) -> None:
    """See ``TreeBuilder.learn``."""
    assert trees.roots is not None
    for node, truth in zip(nodes.tolist(), tokens.tolist(), strict=True):
        if trees.evidence[node] < 0:
            continue  # its children were not searched
        context = 0.0
        for child in trees.children[trees.first[node] : trees.first[node] + trees.count[node]]:
            cell, is_right = np.unravel_index(child["cell"], stats.accepted.shape), child["token"] == truth
            context = float(child["context"] / child["probability"]) if is_right else context
            stats.accepted[cell] += is_right
            stats.predicted[cell] += child["probability"]
            shrink = WINDOW / max(float(stats.predicted[cell]), WINDOW)
            stats.accepted[cell] *= shrink
            stats.predicted[cell] *= shrink
            stats.ratios[cell] = stats.accepted[cell] / stats.predicted[cell]
        if trees.evidence[node]:
            at = (trees.roots.classes[trees.request[node]], trees.evidence[node])
            stats.context_accepted[at] += context
            stats.context_cases[at] += 1
            shrink = WINDOW / max(float(stats.context_cases[at]), WINDOW)
            stats.context_accepted[at] *= shrink
            stats.context_cases[at] *= shrink
            stats.weights[at] = stats.context_accepted[at] / stats.context_cases[at]


def add(table: NgramTable, sequences: list[tuple[np.ndarray, int, int]]) -> None:
    """See ``TreeBuilder.add``."""
    for tokens, start, source in sequences:
        for at in range(max(start, 1), len(tokens)):
            last = np.full(ORDERS, -1, dtype=np.int32)
            before = tokens[max(0, at - ORDERS) : at][::-1]
            last[: len(before)] = before
            keys = keys_of(last[None], np.asarray([source]))[0, : len(before)]
            rows = table.rows_of(keys, source == TEXT_SOURCE)
            for fingerprint, place in zip(keys.astype(np.uint32), rows, strict=True):
                row = table.rows[place]
                if row["fingerprint"] != fingerprint:
                    row["fingerprint"], row["total"], row["successors"], row["fractions"] = fingerprint, 0, -1, 0
                row["successors"][row["total"] % SUCCESSORS] = tokens[at]
                row["total"] = row["total"] + 1 if row["total"] + 1 < 2 * SUCCESSORS else SUCCESSORS
