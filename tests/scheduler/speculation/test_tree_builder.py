"""Dynamic trees: the compiled builder equals the reference, and its trees are the best ones."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.speculation import tree_builder as builders
from euryale.scheduler.speculation.acceptance_stats import AcceptanceRateCorrection, AcceptanceStats, sampling_class_of
from euryale.scheduler.speculation.constants import BINS, NUM_CLASSES, ORDERS, SUCCESSORS, TEXT_SOURCE
from euryale.scheduler.speculation.ngram_table import FILE, NgramTable
from euryale.scheduler.speculation.tree_builder import TreeBuilder, TreeRoots

VOCAB, HEADS, RANKS = 12, 2, 4


def pair() -> tuple[TreeBuilder, TreeBuilder]:
    """Return a compiled builder, and one that runs the reference."""
    text = np.random.default_rng(0).integers(0, VOCAB, 400).astype(np.int32)
    made = [TreeBuilder(NgramTable.of_text([text], text_bits=5), AcceptanceStats(HEADS)) for _ in range(2)]
    assert made[0]._native is not None, "install with a compiler: pip install -e ."
    made[1]._native = None
    return made[0], made[1]


def roots(rng, count: int, has_heads: bool) -> TreeRoots:
    ids = np.stack([[rng.permutation(VOCAB)[:RANKS] for _ in range(HEADS)] for _ in range(count)]).astype(np.int32)
    if not has_heads:
        ids[rng.random(count) < 0.5] = -1
    return TreeRoots(
        last=rng.integers(-1, VOCAB, (count, ORDERS)).astype(np.int32),
        ids=ids,
        logits=-np.sort(-rng.normal(0, 3, ids.shape), axis=2).astype(np.float32),
        depths=rng.integers(0, 5, count).astype(np.int32),
        classes=rng.integers(0, NUM_CLASSES, count).astype(np.int32),
        factors=rng.uniform(0.5, 1.5, count).astype(np.float32),
        values=rng.uniform(0.5, 2, count).astype(np.float32),
        sources=np.stack([rng.integers(2, 5, count), np.full(count, 9), np.full(count, TEXT_SOURCE)], axis=1),
    )


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 5),
    max_draft_tokens=st.integers(0, 40),
    max_per_request=st.integers(1, 20),
    has=st.booleans(),
)
def test_the_compiled_builder_is_the_reference(seed, count, max_draft_tokens, max_per_request, has):
    rng, (native, reference) = np.random.default_rng(seed), pair()
    for _ in range(3):
        made, sequences = roots(rng, count, has), rng.integers(0, VOCAB, 30).astype(np.int32)
        for builder in (native, reference):
            builder.add([(sequences, int(seed % 5), 2 + int(seed % 3)), (sequences[5:9], 1, 9)])
        grown, expected = (
            builder.grow(made, max_draft_tokens, max_per_request, 1e-3) for builder in (native, reference)
        )
        assert grown.num_nodes == expected.num_nodes
        nodes = slice(0, grown.num_nodes)
        for name in ("request", "parent", "token", "depth", "evidence", "count"):
            assert getattr(grown, name)[nodes].tolist() == getattr(expected, name)[nodes].tolist(), name
        # The reference computes powers in float64.
        np.testing.assert_allclose(
            grown.acceptance_probability[nodes], expected.acceptance_probability[nodes], rtol=1e-4
        )
        np.testing.assert_allclose(grown.expected_children[nodes], expected.expected_children[nodes], rtol=1e-4)
        reached = rng.permutation(grown.num_nodes)[:4].astype(np.int32)
        truths = rng.integers(0, VOCAB, len(reached)).astype(np.int32)
        for builder, trees in ((native, grown), (reference, expected)):
            builder.learn(trees, reached, truths)
        for name in ("ratios", "weights", "context_cases"):
            np.testing.assert_allclose(
                getattr(native.stats, name), getattr(reference.stats, name), rtol=1e-4, err_msg=name
            )


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), max_draft_tokens=st.integers(1, 30), max_per_request=st.integers(1, 10))
def test_trees_are_closed_and_bounded_and_the_likeliest_nodes_come_first(seed, max_draft_tokens, max_per_request):
    rng, (builder, _) = np.random.default_rng(seed), pair()
    made = roots(rng, 4, True)
    trees = builder.grow(made, max_draft_tokens, max_per_request, 1e-3)
    total = trees.num_nodes
    request, parent = trees.request[:total], trees.parent[:total]
    acceptance_probability = trees.acceptance_probability[:total]
    assert total - 4 <= max_draft_tokens
    assert np.bincount(request[4:], minlength=4).max(initial=0) <= max_per_request
    value = acceptance_probability * made.values[request]
    assert np.all(np.diff(value[4:]) <= 1e-6)
    for node in range(4, total):
        assert parent[node] < node
        assert request[parent[node]] == request[node]
        assert acceptance_probability[node] <= acceptance_probability[parent[node]]
        assert trees.depth[node] == trees.depth[parent[node]] + 1 <= made.depths[request[node]]
    children = list(zip(parent[4:].tolist(), trees.token[4:total].tolist(), strict=True))
    assert len(set(children)) == len(children), "a token twice below one node"


def test_the_chosen_nodes_are_the_best_of_all_trees():
    """Compares with every subset of possible nodes, by the sum of acceptance probability times value."""
    rng, (builder, _) = np.random.default_rng(5), pair()
    made = roots(rng, 2, True)
    trees = builder.grow(made, 9, 9, 1e-3)
    total = trees.num_nodes
    parent, value = trees.parent, trees.acceptance_probability[:total] * made.values[trees.request[:total]]
    for size in range(1, 6):
        closed = [
            value[list(chosen)].sum()
            for chosen in itertools.combinations(range(2, total), size)
            if all(parent[n] < 2 or parent[n] in chosen for n in chosen)
        ]
        assert value[2 : 2 + size].sum() == pytest.approx(max(closed), rel=1e-6)


def test_a_table_knows_successors_and_overwrites_other_contexts():
    builder, _ = pair()
    table = builder.table
    sequences = np.asarray([5, 6, 7, 8, 5, 6, 7, 9, 5, 6, 7, 9, 5, 6, 7, 9, 5, 6, 7, 9], dtype=np.int32)
    builder.add([(sequences[:3], 0, 77)])
    builder.add([(sequences, 3, 77)])
    fractions, evidence, cases = builders.reference.find(table, np.asarray([7, 6, 5], dtype=np.int32), 77)
    assert fractions == {9: 1.0}, "four cases are remembered, the eldest is forgotten"
    assert (evidence, cases) == ((ORDERS - 1) * SUCCESSORS + 4, 4)
    assert builders.reference.find(table, np.asarray([7, 6, 5], dtype=np.int32), 78)[0] == {}
    shorter = builders.reference.find(table, np.asarray([7, 1, 1], dtype=np.int32), 77)
    assert shorter == ({9: 1.0}, 4, 4)
    # With as many new contexts as rows, the table keeps its size and the rows of the text.
    text = table.rows[: 1 << table.text_bits].copy()
    small = TreeBuilder(NgramTable(live_bits=4), AcceptanceStats(HEADS))
    many = np.random.default_rng(1).integers(0, 1000, 500).astype(np.int32)
    small.add([(many, 0, 3)])
    assert len(small.table.rows) == 1 + 16
    builder.add([(many, 0, 3)])
    assert np.array_equal(table.rows[: 1 << table.text_bits], text)


def test_the_text_counts_successors(tmp_path):
    text = np.asarray([1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2, 3], dtype=np.int32)
    table = NgramTable.of_text([text], text_bits=8)
    fractions, evidence, _ = builders.reference.find(table, np.asarray([2, 1, 9], dtype=np.int32), TEXT_SOURCE)
    assert fractions == pytest.approx({3: 0.75, 4: 0.25}, abs=1e-4)
    assert evidence == SUCCESSORS + 2
    table.save_text(tmp_path)
    again = NgramTable.load_text(tmp_path, vocab_size=5)
    assert np.array_equal(again.rows[:256], table.rows[:256])
    with pytest.raises(ValueError, match="outside the vocabulary of 4: it belongs to another model"):
        NgramTable.load_text(tmp_path, vocab_size=4)
    arrays = load_file(tmp_path / FILE)
    save_file(arrays | {"fractions": arrays["fractions"][:, :2].copy()}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"its tensor fractions must be uint16 \[rows, 4\]"):
        NgramTable.load_text(tmp_path, vocab_size=5)
    save_file(arrays | {"total": arrays["total"] + np.uint32(SUCCESSORS)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="its tensor total exceeds 4"):
        NgramTable.load_text(tmp_path, vocab_size=5)
    (tmp_path / FILE).write_bytes(b"no table")
    with pytest.raises(ValueError, match="is not an n-gram table"):
        NgramTable.load_text(tmp_path, vocab_size=5)


def test_a_context_may_occur_without_limit():
    """After half a million occurrences the latest successors are still known."""
    for builder in pair():
        tokens = np.asarray([3, 4] * (250 if builder._native is None else 250_000) + [3, 5], dtype=np.int32)
        builder.add([(tokens, 0, 3)])
        fractions, *_ = builders.reference.find(builder.table, np.asarray([3, 4, 3], dtype=np.int32), 3)
        assert fractions == {4: 0.75, 5: 0.25}
        assert builder.table.rows["total"][1 << builder.table.text_bits :].max() < 2 * SUCCESSORS


def test_stats_follow_the_acceptance_rate():
    """Draft tokens accepted half as often as predicted soon get half the probability; the same when that changes."""
    builder, _ = pair()
    rng, stats = np.random.default_rng(0), builder.stats
    made = roots(rng, 1, True)
    made.depths[:], made.factors[:] = 1, 1.0
    for true_fraction in (0.25, 0.9):
        for _ in range(600):
            trees = builder.grow(made, 4, 4, 1e-3)
            child = trees.children[trees.first[0]]
            truth = child["token"] if rng.random() < true_fraction else VOCAB + 1
            builder.learn(trees, np.zeros(1, dtype=np.int32), np.asarray([truth], dtype=np.int32))
        trees = builder.grow(made, 4, 4, 1e-3)
        likeliest = trees.children[trees.first[0]]
        assert likeliest["acceptance_probability"] == pytest.approx(true_fraction, abs=0.12)
    assert stats.ratios.shape == (NUM_CLASSES, HEADS + 1, 4, BINS)


def test_the_correction_follows_a_requests_acceptance_rate():
    high, low, fair = AcceptanceRateCorrection(), AcceptanceRateCorrection(), AcceptanceRateCorrection()
    for _ in range(30):
        high.learn(2, 1)
        low.learn(0, 1)
        fair.learn(1, 1)
    assert high.factor > 1.3
    assert low.factor < 0.5
    assert fair.factor == pytest.approx(1)


def test_sampling_classes():
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0.3),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, acceptance="typical"),
    ]
    assert [sampling_class_of(p) for p in kinds] == [0, 1, 2, 3]
    assert sampling_class_of(SamplingParams(acceptance="typical")) == 0  # greedy: it accepts the argmax only
