"""Packing of documents into windows of one length, and the seeded order of windows in training.

A document that fits in a window is never cut; a longer one is cut into full windows and a remainder. Positions restart
at 0 in every document of a window, and documents do not attend to each other. Shape suffixes: W windows, L positions.
"""

import bisect
import logging
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from euryale.training.data import Document, load_documents
from euryale.training.options import TrainOptions

logger = logging.getLogger("euryale.training")


class Batch(NamedTuple):
    """Windows of one step on one rank.

    ``tokens`` int64 [B, L]. ``learned`` bool [B, L]: the loss mask. ``documents`` int32 [B, L]: index of the token's
    document in the window. ``positions`` int64 [B, L]: position within the document. ``windows`` int64 [B]: indices of
    the windows.
    """

    tokens: torch.Tensor
    learned: torch.Tensor
    documents: torch.Tensor
    positions: torch.Tensor
    windows: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device``."""
        return Batch(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True)
class Windows:
    """``tokens`` int32 [W, L], ``learned`` bool [W, L], ``documents`` int32 [W, L]. Padding is a separate document
    outside the loss mask."""

    tokens: np.ndarray
    learned: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_learned(self) -> int:
        """Number of tokens in the loss mask."""
        return int(self.learned.sum())

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the windows with these indices, int64 [B]."""
        documents = self.documents[indices]
        places = np.arange(documents.shape[1])
        begins = np.diff(documents, axis=1, prepend=-1) != 0
        positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        parts = (self.tokens[indices].astype(np.int64), self.learned[indices], documents, positions, indices)
        return Batch(*map(torch.from_numpy, parts))

    def select(self, indices: np.ndarray) -> "Windows":
        """Return only the windows with these indices."""
        return Windows(self.tokens[indices], self.learned[indices], self.documents[indices])

    def spaced_indices(self, count: int) -> np.ndarray:
        """Return the indices of at most ``count`` evenly spaced windows, int64."""
        return np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64))


def pack(documents: list[Document], length: int, padding: int) -> Windows:
    """Pack by best fit, longest first: every piece goes to the fullest window with enough room.

    ``padding``: token id of padding. ValueError if all loss masks are empty.
    """
    pieces = [
        (document.tokens[start : start + length], document.learned[start : start + length])
        for document in documents
        for start in range(0, len(document.tokens), length)
    ]
    pieces = [piece for piece in pieces if piece[1].any()]
    if not pieces:
        raise ValueError("there is nothing to learn from: every document is empty or has no answer")
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for i in sorted(range(len(pieces)), key=lambda i: (-len(pieces[i][0]), i)):
        size = len(pieces[i][0])
        place = bisect.bisect_left(rooms, (size, 0))
        room, number = rooms.pop(place) if place < len(rooms) else (length, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(i)
        if room > size:
            bisect.insort(rooms, (room - size, number))
    tokens = np.full((len(bins), length), padding, dtype=np.int32)
    learned = np.zeros((len(bins), length), dtype=bool)
    numbers = np.zeros((len(bins), length), dtype=np.int32)
    for row, members in enumerate(bins):
        start = 0
        for number, i in enumerate(members):
            stop = start + len(pieces[i][0])
            tokens[row, start:stop], learned[row, start:stop] = pieces[i]
            numbers[row, start:stop] = number
            start = stop
        numbers[row, start:] = len(members)
    return Windows(tokens, learned, numbers)


def order(num_windows: int, first: int, count: int, seed: int) -> np.ndarray:
    """Return entries ``first`` to ``first + count`` of an endless order that shuffles all windows in every epoch,
    int64.

    The result depends on the arguments only, so that a resumed training sees the same windows.
    """
    epochs = range(first // num_windows, (first + count - 1) // num_windows + 1)
    shuffled = np.concatenate([np.random.default_rng((seed, epoch)).permutation(num_windows) for epoch in epochs])
    start = first - epochs[0] * num_windows
    return shuffled[start : start + count]


def load_windows(args: TrainOptions, vocab_size: int, max_positions: int) -> tuple[Windows, Windows]:
    """Return the windows to train on and to measure on. ValueError for bad input."""
    if args.length > max_positions:
        raise ValueError(f"--length {args.length} exceeds the model's {max_positions} positions: lower it")
    trained, held, tokenizer = load_documents(args, vocab_size)
    padding = tokenizer.eos_token_id or 0
    windows, held_out = pack(trained, args.length, padding), pack(held, args.length, padding)
    logger.info(
        "%d documents in %d windows of %d (%.2f M learned tokens), %d windows held out",
        len(trained), len(windows), args.length, windows.num_learned / 1e6, len(held_out),
    )  # fmt: skip
    return windows, held_out
