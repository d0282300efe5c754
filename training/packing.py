"""Documents packed into windows of one length, and the seeded order in which training sees them.

A document that fits is never cut; a longer one is cut into full windows and a rest. Documents in one window do not see
each other: every one counts its positions from 0. Shape suffixes: W windows, L positions.
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
    """Windows of one step on one rank, each tensor [B, L]: ``tokens`` int64; ``learned`` bool; ``documents`` int32,
    which document of the window a token belongs to; ``positions`` int64 within the document; ``windows`` int64 [B],
    their numbers."""

    tokens: torch.Tensor
    learned: torch.Tensor
    documents: torch.Tensor
    positions: torch.Tensor
    windows: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True)
class Windows:
    """``tokens`` int32 [W, L], ``learned`` bool [W, L], ``documents`` int32 [W, L]. Padding is a document of its own of
    which nothing is learned."""

    tokens: np.ndarray
    learned: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_learned(self) -> int:
        return int(self.learned.sum())

    def batch(self, indices: np.ndarray) -> Batch:
        """The windows of these numbers."""
        documents = self.documents[indices]
        places = np.arange(documents.shape[1])
        begins = np.diff(documents, axis=1, prepend=-1) != 0
        positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        parts = (self.tokens[indices].astype(np.int64), self.learned[indices], documents, positions, indices)
        return Batch(*map(torch.from_numpy, parts))

    def some(self, indices: np.ndarray) -> "Windows":
        """Only the windows of these numbers."""
        return Windows(self.tokens[indices], self.learned[indices], self.documents[indices])

    def chosen(self, count: int) -> np.ndarray:
        """Numbers of at most ``count`` evenly spaced windows."""
        return np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64))


def pack(documents: list[Document], length: int, padding: int) -> Windows:
    """Best fit, longest first: every piece goes to the fullest window that still has room for it.

    ValueError if nothing is learned from any of the documents.
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
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
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
    """Places ``first`` to ``first + count`` of an endless order that shuffles all windows anew in every epoch, int64.

    A function of its arguments alone, so that a resumed training sees what an undisturbed one would have seen.
    """
    epochs = range(first // num_windows, (first + count - 1) // num_windows + 1)
    shuffled = np.concatenate([np.random.default_rng((seed, epoch)).permutation(num_windows) for epoch in epochs])
    start = first - epochs[0] * num_windows
    return shuffled[start : start + count]


def load_windows(args: TrainOptions, vocab_size: int, max_positions: int) -> tuple[Windows, Windows]:
    """Windows to train on and to measure on."""
    if args.length > max_positions:
        raise ValueError(f"--length {args.length} is more than the {max_positions} tokens the model was made for")
    trained, held, tokenizer = load_documents(args, vocab_size)
    padding = tokenizer.eos_token_id or 0
    windows, held_out = pack(trained, args.length, padding), pack(held, args.length, padding)
    logger.info(
        "%d documents in %d windows of %d (%.2f M learned tokens), %d windows held out",
        len(trained), len(windows), args.length, windows.num_learned / 1e6, len(held_out),
    )  # fmt: skip
    return windows, held_out
