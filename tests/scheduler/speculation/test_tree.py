"""Tree shapes: parsing, limiting, searching."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from euryale.scheduler.speculation.tree import MAX_NODES, TreeShape, chain, default_tree, load_tree, search_tree

paths = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=30, unique=True)


@given(paths)
def test_every_listed_path_is_in_the_tree_and_parents_come_first(listed):
    shape = TreeShape.from_paths(listed)
    found = [tuple(p) for p in shape.paths()]
    assert set(listed) <= set(found)
    assert len(set(found)) == len(found) == shape.num_draft_tokens
    assert all(0 <= shape.parents[i] < i for i in range(1, len(shape.parents)))
    for path, depth in zip(found, shape.depths[1:], strict=True):
        assert len(path) == depth
        assert path[:-1] == () or path[:-1] in found
    assert shape.num_candidates == max(max(p) for p in found) + 1


@given(paths, st.integers(0, 30), st.integers(0, 5))
def test_a_limited_tree_is_a_part_of_the_tree(listed, num_draft_tokens, depth):
    shape = TreeShape.from_paths(listed)
    part = shape.limited(num_draft_tokens, depth)
    limited = [tuple(p) for p in part.paths()]
    assert part.num_draft_tokens <= num_draft_tokens
    assert part.depth <= depth
    whole = [tuple(p) for p in shape.paths() if len(p) <= depth]
    assert limited == whole[:num_draft_tokens]


def test_tokens_follow_head_and_rank():
    shape = TreeShape.from_paths([[0], [2], [0, 1], [2, 0]])
    candidates = np.asarray([[10, 11, 12], [20, 21, 22]], dtype=np.int32)
    assert shape.tokens(candidates).tolist() == [10, 12, 21, 20]


def test_search_is_optimal_for_small_cases():
    """Compares with every tree closed under ancestors, by brute force."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        accuracy = np.sort(rng.uniform(0, 0.4, size=(2, 3)), axis=1)[:, ::-1]
        value = {(a,): accuracy[0, a] for a in range(3)}
        value |= {(a, b): accuracy[0, a] * accuracy[1, b] for a in range(3) for b in range(3)}

        def best(num_draft_tokens, value=value):
            sets = {frozenset()}
            for _ in range(num_draft_tokens):
                sets = {s | {p} for s in sets for p in value if p not in s and (len(p) == 1 or p[:1] in s)}
            return max(sum(value[p] for p in s) for s in sets)

        for num_draft_tokens in (1, 3, 5):
            found = search_tree(accuracy, num_draft_tokens)
            got = sum(value[tuple(p)] for p in found.paths())
            assert got == pytest.approx(best(num_draft_tokens))


@pytest.mark.parametrize("num_heads", [1, 2, 5, 8])
def test_there_is_a_tree_for_any_number_of_heads(num_heads):
    assert default_tree(num_heads).depth <= num_heads
    assert default_tree(num_heads).num_draft_tokens > 0
    assert chain(num_heads).paths() == [[0] * (d + 1) for d in range(num_heads)]


BAD = {
    "[]": "must be a JSON list of paths",
    "{}": "must be a JSON list of paths",
    "[[0], [0]]": "twice",
    "[[]]": "must be a list of 1 to 127 items",
    '[["a"]]': "must be a list of 1 to 127 items",
    "[[-1]]": "must be a list of 1 to 127 items",
    "[[0.5]]": "must be a list of 1 to 127 items",
    "[[true]]": "must be a list of 1 to 127 items",
    "[3]": "must be a list of 1 to 127 items",
    "[[0], [0, 0], [0, 0, 0]]": "has depth 3 but there are 2 Medusa heads",
    json.dumps([[i] for i in range(MAX_NODES)]): "more than 128 nodes",
    "[[0]": "tree.json is damaged .*: give --tree dynamic",
    "[" * 1000 + "]" * 1000: "nested deeper than 32 levels",
    "[" * 100_000: "nested deeper than 32 levels",
    json.dumps([[2**31 - 1]]): "must be a list of 1 to 127 items, each a whole number from 0 to 2147483646",
    json.dumps([[10**18]]): "must be a list of 1 to 127 items, each a whole number",
    json.dumps([[0] * 100_000]): "must be a list of 1 to 127 items",
    json.dumps([[i, i] for i in range(100_000)]): "more than 128 nodes",
}


@pytest.mark.parametrize("content", BAD, ids=lambda content: content[:20])
def test_a_bad_tree_is_refused_with_the_reason(tmp_path, content):
    path = tmp_path / "tree.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=BAD[content]) as caught:
        load_tree(path, 2)
    assert "tree.json" in str(caught.value)
    assert len(str(caught.value)) < 500
    with pytest.raises(ValueError, match=r"cannot read .*none.json \(No such file or directory\): give --tree dynamic"):
        load_tree(tmp_path / "none.json", 2)
