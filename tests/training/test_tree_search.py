"""Static trees against their definitions, on synthetic ranks."""

import itertools
import json

import numpy as np
import pytest

from euryale.scheduler.speculation.tree import TreeShape, load_tree, search_tree
from euryale.training import tree_search
from euryale.training.tree_search import NUM_RANKS, Continuations


def synthetic_ranks(count: int = 4000) -> np.ndarray:
    """Return ranks of dependent heads: all are right together, or each is mostly wrong."""
    rng = np.random.default_rng(0)
    easy = rng.random((count, 1)) < 0.4
    hard = rng.integers(0, NUM_RANKS + 1, (count, 3))
    return np.where(easy, rng.integers(0, 2, (count, 3)), hard)


@pytest.mark.parametrize("size", [1, 3, 6])
def test_joint_tree_is_the_best_tree(size):
    """Without smoothing, the greedy order reaches the best expected length of all trees, found by enumeration."""
    ranks = np.minimum(synthetic_ranks()[:, :2], 3)
    ranks = np.where(ranks == 3, NUM_RANKS, ranks)
    nodes = [[a] for a in range(3)] + [[a, b] for a in range(3) for b in range(3)]
    closed = (t for t in itertools.combinations(nodes, size) if all([n[0]] in t for n in t))
    best = max(tree_search.num_accepted_tokens(ranks, list(tree)).mean() for tree in closed)
    found = tree_search.search_joint_tree(ranks, size, prior_count=0.0)
    assert tree_search.num_accepted_tokens(ranks, found).mean() == best


def test_joint_tree_order(tmp_path):
    ranks = synthetic_ranks()
    order = tree_search.search_joint_tree(ranks, 40)
    (tmp_path / "tree.json").write_text(json.dumps(order))
    assert load_tree(tmp_path / "tree.json", 3).paths() == order  # parents first, no duplicates, nothing added
    gains = np.diff([tree_search.num_accepted_tokens(ranks, order[:n]).mean() for n in range(20)])
    # Smoothing may swap neighbours whose counts differ by less than the prior's weight.
    assert (np.diff(gains) < 64 / len(ranks)).all()
    independent = search_tree(tree_search.accuracy_by_rank(ranks), 16).paths()
    assert (
        tree_search.num_accepted_tokens(ranks, order[:16]).mean()
        > tree_search.num_accepted_tokens(ranks, independent).mean()
    )


def test_tokens_per_step_walks_the_answers():
    ranks = np.array([[[0, 0], [9, 9], [9, 9], [0, 3], [1, 0], [9, 9], [0, 0]]])
    valid = np.ones((1, 7), dtype=bool)
    valid[0, 6] = False
    # Steps: position 0 accepts 2 of [0], [0, 0]; position 3 accepts 1; position 5 none; 6 is beyond the end.
    measured = Continuations(ranks, valid)
    assert tree_search.tokens_per_step(measured, [[0], [0, 0]]) == pytest.approx((3 + 2 + 1) / 3)
    assert tree_search.tokens_per_step(measured, []) == 1
    assert tree_search.num_accepted_tokens(ranks, [[0], [1], [1, 0]])[0].tolist() == [1, 0, 0, 1, 2, 0, 1]


def test_walked_tree_is_no_worse_where_steps_start():
    """Ranks come in long easy runs: most positions are easy, but most steps start at the hard ones."""
    rng = np.random.default_rng(0)
    hard = np.arange(60) % 4 == 0
    ranks = np.where(hard[None, :, None], rng.integers(1, 4, (50, 60, 3)), 0)
    measured = Continuations(ranks, np.ones((50, 60), dtype=bool))
    everywhere = tree_search.search_joint_tree(measured.flat(), 4)
    walked = tree_search.search_walked_tree(measured, 4)
    assert len(walked) == 4
    assert tree_search.tokens_per_step(measured, walked) >= tree_search.tokens_per_step(measured, everywhere)
    starts = tree_search.step_starts(measured, walked)
    assert starts[:, 0].all()
    lengths = tree_search.num_accepted_tokens(ranks, walked)
    for row, accepted in zip(starts, lengths, strict=True):
        begun = np.flatnonzero(row)
        assert (np.diff(begun) == 1 + accepted[begun[:-1]]).all()


# Top-1 to top-5 accuracies of the five heads published for a 7B chat model, in percent (training log of the heads).
PUBLISHED = [
    [56.0, 67.2, 72.7, 76.0, 78.0],
    [31.6, 42.4, 48.5, 52.8, 56.2],
    [20.1, 28.8, 34.8, 38.3, 41.7],
    [14.7, 22.5, 27.4, 31.1, 34.0],
    [11.8, 18.7, 23.5, 27.2, 30.0],
]


@pytest.mark.parametrize("size", [1, 7, 63])
def test_no_other_tree_expects_more_of_the_published_accuracies(size):
    """The expectation of a searched tree is the sum of the largest path products."""
    accuracy = np.diff(np.asarray(PUBLISHED) / 100, axis=1, prepend=0)
    paths = search_tree(accuracy, size).paths()
    products = [
        np.prod([accuracy[depth, rank] for depth, rank in enumerate(path)])
        for length in range(1, 6)
        for path in itertools.product(range(5), repeat=length)
    ]
    gained = [np.prod([accuracy[depth, rank] for depth, rank in enumerate(path)]) for path in paths]
    assert sum(gained) == pytest.approx(sum(sorted(products)[-size:]))
    assert TreeShape.from_paths(paths).num_draft_tokens == size


def test_acceptance_probabilities_add_up_to_the_accepted_length():
    rng = np.random.default_rng(0)
    measured = Continuations(np.minimum(rng.geometric(0.5, (40, 60, 3)) - 1, NUM_RANKS), np.ones((40, 60), dtype=bool))
    paths = tree_search.search_walked_tree(measured, 8)
    probabilities = tree_search.acceptance_probability(measured, paths)
    assert 1 + sum(probabilities) == pytest.approx(tree_search.tokens_per_step(measured, paths))
