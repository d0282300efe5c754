"""Packing: windows lose no token and cut no document that fits, and their order can be resumed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from euryale.training.data import Document
from euryale.training.packing import order, pack

PADDING = 1


def make_documents(lengths: list[int]) -> list[Document]:
    """Return documents of these lengths in which every token has a different id."""
    starts = np.cumsum([10, *lengths])
    return [
        Document(np.arange(s, s + n, dtype=np.int32), np.ones(n, dtype=bool))
        for s, n in zip(starts, lengths, strict=False)
    ]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), length=st.integers(2, 16))
def test_every_token_is_in_one_window_and_documents_that_fit_are_whole(lengths, length):
    documents = make_documents(lengths)
    windows = pack(documents, length, PADDING)
    assert windows.tokens.shape == windows.learned.shape == windows.documents.shape == (len(windows), length)
    assert sorted(windows.tokens[windows.learned].tolist()) == list(range(10, 10 + sum(lengths)))
    assert (windows.tokens[~windows.learned] == PADDING).all()
    where = {
        int(t): (w, int(windows.documents[w, i])) for w in range(len(windows)) for i, t in enumerate(windows.tokens[w])
    }
    for document in documents:
        pieces = {where[int(t)] for t in document.tokens}
        assert len(pieces) == -(-len(document.tokens) // length)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20))
def test_positions_restart_with_every_document(lengths):
    windows = pack(make_documents(lengths), 12, PADDING)
    batch = windows.batch(np.arange(len(windows)))
    for row in range(len(windows)):
        for number in set(batch.documents[row].tolist()):
            places = batch.positions[row][batch.documents[row] == number]
            assert places.tolist() == list(range(len(places)))


def test_best_fit_fills_windows():
    windows = pack(make_documents([6, 4, 7, 3, 5, 5]), 10, PADDING)
    assert len(windows) == 3
    assert windows.learned.all()


def test_pieces_without_anything_to_learn_are_left_out():
    prompt = Document(np.arange(8, dtype=np.int32), np.arange(8) >= 6)
    assert len(pack([prompt], 4, PADDING)) == 1
    with pytest.raises(ValueError, match="nothing to learn from"):
        pack([Document(np.arange(8, dtype=np.int32), np.zeros(8, dtype=bool))], 4, PADDING)
    with pytest.raises(ValueError, match="nothing to learn from"):
        pack([], 4, PADDING)


@given(count=st.integers(1, 20), first=st.integers(0, 100), number=st.integers(1, 50), seed=st.integers(0, 5))
def test_the_order_can_be_entered_anywhere(count, first, number, seed):
    whole = order(count, 0, first + number, seed)
    assert order(count, first, number, seed).tolist() == whole[first:].tolist()
    assert sorted(order(count, 3 * count, count, seed).tolist()) == list(range(count))


def test_epochs_and_seeds_differ():
    first, second, other = order(50, 0, 50, 0), order(50, 50, 50, 0), order(50, 0, 50, 1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
