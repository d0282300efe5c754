"""Growing candidate trees in plain Python: what ``builder.cpp`` does, to be read and to be tested against.

A head guesses its depth without knowing what was chosen above it. What followed the same tokens before repairs that.
The probability of a guess below a node is made of two opinions:

* its head's probability among the tokens that the head names, times a power of the *prior*: how often it followed
  the tokens of its path in recent traffic and calibration text (a product of experts, over all guesses named by
  anybody);
* how often it followed them in the request's own prompt and answer, as the last few cases have it, with a weight
  learned by the length of the context and the number of cases.

What is expected so is multiplied by what experience says of such statements (``acceptance_probability``) and by the
request's own factor. Below the deepest head, trees go on with what followed before.
"""

import heapq
import math

import numpy as np

from euryale.scheduler.speculation.acceptance_stats import LIKELY_BINS, WINDOW
from euryale.scheduler.speculation.ngram_table import NUM_SOURCES, ORDERS, SUCCESSORS, TEXT, keys_of

# Fitted to answers of the demo model; the result is flat around these values.
CONSTANTS = {
    "head_power": 0.9,
    "prior_power": 0.4,
    "floor": 1e-4,  # prior of what never followed
    "other": 2e-3,  # mass of the tokens that nobody named, beside the products
    "text_cases": 2.0,  # what the text's word counts for, in cases of recent traffic
    "unnamed": 1.0,  # nats that a token lies below the last one that the head names
    "highest": 0.98,  # chance of a guess
    "slightest": 2e-3,  # a less likely guess is none
    "window": WINDOW,
}
_OWN, _TRAFFIC, _TEXT = range(NUM_SOURCES)


def find(table, last: np.ndarray, source: int) -> tuple[dict[int, float], int, int]:
    """What followed the longest known context that ends in ``last`` int32 [ORDERS], the latest token first: the
    successors' shares, the evidence (see ``acceptance_probability``) and the number of cases."""
    keys = keys_of(last[None], np.asarray([source]))[0]
    places = table.rows_of(keys, source == TEXT)
    for order in reversed(range(ORDERS)):
        row = table.rows[places[order]]
        if last[order] < 0 or row["fingerprint"] != keys[order].astype(np.uint32) or not row["total"]:
            continue
        cases = min(int(row["total"]), SUCCESSORS)
        shares: dict[int, float] = {}
        for i, token in enumerate(row["successors"][:cases].tolist()):
            share = int(row["shares"][i]) / 65535 if source == TEXT else 1 / cases
            shares[token] = shares.get(token, 0.0) + share
        return shares, order * SUCCESSORS + cases, cases
    return {}, 0, 0


def grow(builder) -> int:
    """See ``TreeBuilder.grow``; writes the builder's arrays."""
    f, roots = builder, builder.roots
    settings = f._struct
    lasts: list[np.ndarray] = []
    f.num_children = 0
    heap: list[tuple[float, int, int]] = []
    taken = [0] * len(roots.last)

    def offer(node: int, place: int) -> None:
        """Put a guess below a node on the heap, if it is worth a thought."""
        if place < f.count[node]:
            key = float(f.children["acceptance_probability"][f.first[node] + place]) * float(
                roots.values[f.request[node]]
            )
            if key >= settings.least:
                heapq.heappush(heap, (-key, node, place))

    def add(request: int, parent: int, token: int, acceptance_probability: float) -> None:
        node = len(lasts)
        before = roots.last[request] if parent < 0 else [token, *lasts[parent][: ORDERS - 1]]
        lasts.append(np.asarray(before, dtype=np.int32))
        f.request[node], f.parent[node], f.token[node], f.acceptance_probability[node] = (
            request,
            parent,
            token,
            acceptance_probability,
        )
        f.depth[node] = 0 if parent < 0 else f.depth[parent] + 1
        f.expected_children[node], f.evidence[node], f.first[node], f.count[node] = 0, -1, f.num_children, 0

    def expand(node: int) -> None:
        value = float(f.acceptance_probability[node]) * float(roots.values[f.request[node]])
        if f.depth[node] < roots.depths[f.request[node]] and value >= settings.least:
            _expand(f, node, lasts[node])
            offer(node, 0)

    for request, last in enumerate(roots.last):
        add(request, -1, last[0], 1.0)
    for request in range(len(roots.last)):
        expand(request)
    while heap and len(lasts) < len(roots.last) + settings.most:
        _, parent, place = heapq.heappop(heap)
        request = int(f.request[parent])
        if taken[request] == settings.each:
            continue
        taken[request] += 1
        guess = f.children[f.first[parent] + place]
        f.expected_children[parent] += guess["acceptance_probability"] / f.acceptance_probability[parent]
        add(request, parent, int(guess["token"]), float(guess["acceptance_probability"]))
        offer(parent, place + 1)
        expand(len(lasts) - 1)
    return len(lasts)


def _expand(f, node: int, last: np.ndarray) -> None:
    """Write a node's children, likeliest first."""
    roots, estimates, c = f.roots, f.estimates, CONSTANTS
    request, depth = int(f.request[node]), int(f.depth[node])
    known = [find(f.table, last, int(source)) for source in roots.sources[request]]
    heads: dict[int, float] = {}
    if depth < roots.ids.shape[1] and roots.ids[request, depth, 0] >= 0:
        logits = roots.logits[request, depth].astype(np.float64)
        logs = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        heads = dict(zip(roots.ids[request, depth].tolist(), logs.tolist(), strict=True))
    unnamed = min(heads.values(), default=0) - c["unnamed"]
    tokens = list(heads) + [t for shares, _, _ in known for t in shares if t not in heads]
    tokens = list(dict.fromkeys(tokens))
    cases = known[_TRAFFIC][2]
    trust = cases / (cases + c["text_cases"] * (known[_TEXT][2] > 0) + 1e-6)
    products = []
    for token in tokens:
        prior = trust * known[_TRAFFIC][0].get(token, 0) + (1 - trust) * known[_TEXT][0].get(token, 0) + c["floor"]
        product = prior ** c["prior_power"] * math.exp(c["head_power"] * heads.get(token, unnamed)) if heads else prior
        products.append(product)
    total = sum(products) + c["other"]
    kind = int(roots.classes[request])
    weight = float(estimates.weights[kind, known[_OWN][1]])
    f.evidence[node], f.first[node] = known[_OWN][1], f.num_children
    for i, token in enumerate(tokens):
        own = weight * known[_OWN][0].get(token, 0)
        probability = np.float32(own + (1 - weight) * products[i] / total)
        if probability < c["slightest"]:
            continue
        rank = min(i, 2) if token in heads else 3
        cell = (kind, min(depth, estimates.num_depths - 1), rank, bin_of(probability, estimates.bins))
        chance = min(probability * estimates.ratios[cell] * roots.factors[request], np.float32(c["highest"]))
        flat = np.ravel_multi_index(cell, estimates.ratios.shape)
        f.children[f.num_children] = (token, flat, f.acceptance_probability[node] * chance, probability, own)
        f.num_children += 1
    own = f.children[f.first[node] : f.num_children]
    own[:] = own[np.argsort(-own["acceptance_probability"], kind="stable")]
    f.count[node] = len(own)


def bin_of(probability: np.float32, bins: int) -> int:
    """Its place among the bins of ``acceptance_probability``, by exponent and first bit of the mantissa: of the
    probability itself below 1/2, else of what it lacks to 1."""
    unlikely = bins - LIKELY_BINS
    if probability < 0.5:
        return max(unlikely - 1 - _halves(probability), 0)
    return unlikely + min(max(_halves(np.float32(1) - probability), 0), LIKELY_BINS - 1)


def _halves(share: np.float32) -> int:
    """Half octaves below 1/2."""
    return 251 - (int(np.float32(share).view(np.int32)) >> 22)


def learn(builder, nodes: np.ndarray, tokens: np.ndarray) -> None:
    """See ``TreeBuilder.learn``."""
    f, estimates = builder, builder.estimates
    for node, truth in zip(nodes.tolist(), tokens.tolist(), strict=True):
        if f.evidence[node] < 0:
            continue  # it never got guesses
        own = 0.0
        for guess in f.children[f.first[node] : f.first[node] + f.count[node]]:
            cell, is_right = np.unravel_index(guess["cell"], estimates.accepted.shape), guess["token"] == truth
            own = float(guess["own"] / guess["probability"]) if is_right else own
            estimates.accepted[cell] += is_right
            estimates.predicted[cell] += guess["probability"]
            shrink = WINDOW / max(estimates.predicted[cell], WINDOW)
            estimates.accepted[cell] *= shrink
            estimates.predicted[cell] *= shrink
            estimates.ratios[cell] = estimates.accepted[cell] / estimates.predicted[cell]
        if f.evidence[node]:
            at = (f.roots.classes[f.request[node]], f.evidence[node])
            estimates.context_accepted[at] += own
            estimates.context_cases[at] += 1
            shrink = WINDOW / max(estimates.context_cases[at], WINDOW)
            estimates.context_accepted[at] *= shrink
            estimates.context_cases[at] *= shrink
            estimates.weights[at] = estimates.context_accepted[at] / estimates.context_cases[at]


def add(table, sequences: list[tuple[np.ndarray, int, int]]) -> None:
    """See ``TreeBuilder.add``."""
    for tokens, start, source in sequences:
        for at in range(max(start, 1), len(tokens)):
            last = np.full(ORDERS, -1, dtype=np.int32)
            before = tokens[max(0, at - ORDERS) : at][::-1]
            last[: len(before)] = before
            names = keys_of(last[None], np.asarray([source]))[0, : len(before)]
            for name, place in zip(names.astype(np.uint32), table.rows_of(names, source == TEXT), strict=True):
                row = table.rows[place]
                if row["fingerprint"] != name:
                    row["fingerprint"], row["total"], row["successors"], row["shares"] = name, 0, -1, 0
                row["successors"][row["total"] % SUCCESSORS] = tokens[at]
                row["total"] = row["total"] + 1 if row["total"] + 1 < 2 * SUCCESSORS else SUCCESSORS
