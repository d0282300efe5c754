"""Answers and their head candidates without a model: drawn from published accuracies, or recorded.

**Drawn.** An answer is a sequence of random tokens. A head's candidates are the true token at some rank, and other
random tokens. The published accuracy of head h at rank r is the mean over easy and hard positions; ranks beyond the
fifth are extrapolated. At a position, the probability that the head's top candidate is right is ``q = low + (1 - low) *
Phi(a + SPREAD * z)`` with z standard normal. The mean of Phi(a + s z) is Phi(a / sqrt(1 + s^2)), and ``a`` is set so
that the mean of q is the published accuracy. ``low`` keeps the second rank from being more probable than the first. The
other ranks divide 1 - q in their published proportions. Logits are the logarithms of these probabilities, so that their
softmax is calibrated.

Heads are correlated: z is a weighted sum of three independent normal variables. One belongs to the predicted token and
is common to all heads that predict it. One belongs to the position and is common to all heads there. One belongs to
head and position. SPREAD and the weights are assumptions. With the published 7B accuracies, the published tree of 63
draft tokens reaches 2.45 tokens per step (independent heads: 2.43; measured by others on real text: 2.3 to 2.6).

**Recorded.** Answers of a real model and the candidates of its heads at each token, from a ``.npz``
(``record_heads.py``).

Shape suffixes: L tokens, K heads, R ranks.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Protocol

import numpy as np

from euryale.scheduler.step_result import HeadCandidates

RANKS = 10
SPREAD = 1.5
TOKEN_VARIANCE, POSITION_VARIANCE = 0.5, 0.25  # fractions of the variance of z
_STRIDE = 37  # between the ids of a head's wrong candidates


@dataclass(frozen=True)
class Answer:
    """An answer and its head candidates.

    ``prompt`` int32; ``truth`` int32 [L], the answer. ``ids`` int32 and ``logits`` float32 [L + 1, K, R]: candidates of
    head k for token n + k of the answer once n tokens are known.
    """

    prompt: np.ndarray
    truth: np.ndarray
    ids: np.ndarray
    logits: np.ndarray

    def head_candidates(self, known: int) -> HeadCandidates:
        """Return the head candidates once ``known`` tokens of the answer are known."""
        return HeadCandidates(self.ids[known], self.logits[known])


class Answers(Protocol):
    """A source of answers over ``vocab_size`` tokens with ``num_heads`` heads; a key always gives the same answer."""

    num_heads: int
    vocab_size: int

    def make(self, key: int) -> Answer:
        """Return the answer of ``key``."""
        ...


class DrawnAnswers:
    """Random answers whose heads have published accuracies."""

    def __init__(
        self, accuracy_KR: np.ndarray, prompts: range, lengths: range, seed: int = 0, vocab: int = 32000
    ) -> None:
        """``accuracy_KR``: probability of each rank of each head, not cumulative.

        Lengths in tokens are drawn uniformly from the ranges. ValueError for cumulative accuracies.
        """
        self.num_heads, self.vocab_size = len(accuracy_KR), vocab
        self._prompts, self._lengths, self._seed = prompts, lengths, seed
        self.accuracy_KR = accuracy_KR
        top, others_KR = accuracy_KR[:, 0], extrapolate_ranks(accuracy_KR)[:, 1:]
        if np.any(top + others_KR.sum(axis=1) >= 1):
            raise ValueError("a head's accuracies add up to 1 or more: give them by rank, not cumulated")
        self._fractions_KR = others_KR / (1 - top)[:, None]
        self._low = self._fractions_KR[:, 0] / (1 + self._fractions_KR[:, 0])
        means = ((top - self._low) / (1 - self._low)).clip(1e-4, 1 - 1e-4)
        self._offsets = np.array([NormalDist().inv_cdf(m) for m in means]) * math.sqrt(1 + SPREAD**2)

    def make(self, key: int) -> Answer:
        """See Answers."""
        rng = np.random.default_rng([self._seed, key])
        prompt = rng.integers(
            self.vocab_size, size=rng.integers(self._prompts.start, self._prompts.stop), dtype=np.int32
        )
        length, heads = int(rng.integers(self._lengths.start, self._lengths.stop)), self.num_heads
        truth = rng.integers(self.vocab_size, size=length + 1 + heads, dtype=np.int32)
        ahead_LK = np.arange(length + 1)[:, None] + np.arange(heads)
        of_token, of_position = rng.standard_normal(len(truth)), rng.standard_normal((length + 1, 1))
        own = rng.standard_normal(ahead_LK.shape)
        z_LK = math.sqrt(TOKEN_VARIANCE) * of_token[ahead_LK] + math.sqrt(POSITION_VARIANCE) * of_position
        z_LK += math.sqrt(1 - TOKEN_VARIANCE - POSITION_VARIANCE) * own
        q_LK = self._low + (1 - self._low) * _normal_cdf(self._offsets + SPREAD * z_LK).clip(0, 1 - 1e-6)
        probabilities = np.concatenate([q_LK[..., None], (1 - q_LK)[..., None] * self._fractions_KR], axis=2)
        # Rank of the true token; RANKS if it is no candidate.
        rank_LK = (rng.random((*ahead_LK.shape, 1)) > probabilities.cumsum(axis=2)).sum(axis=2)
        true_tokens = truth[ahead_LK][..., None]
        ids = (rng.integers(self.vocab_size, size=(*ahead_LK.shape, 1)) + _STRIDE * np.arange(RANKS)) % self.vocab_size
        ids = np.where(ids == true_tokens, (ids + 1) % self.vocab_size, ids)
        ids = np.where(np.arange(RANKS) == rank_LK[..., None], true_tokens, ids).astype(np.int32)
        return Answer(prompt, truth[:length], ids, np.log(probabilities).astype(np.float32))


class RecordedAnswers:
    """Answers of a real model, repeated in order."""

    def __init__(self, path: Path) -> None:
        """Read a ``.npz`` file of N answers with T tokens in all. ValueError if it is not such a file.

        ``starts`` int64 [N + 1]: start of each answer in the following arrays. ``prompts`` int64 [N]: tokens of the
        prompt, at least two. ``tokens`` int32 [T]: prompts and answers. ``ids`` int32 and ``logits`` float16 or float32
        [T, K, R]: head candidates at each token, head k's for the token k + 2 positions later. ``vocab_size``: number
        of tokens.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                self._file = {
                    name: arrays[name] for name in ("starts", "prompts", "tokens", "ids", "logits", "vocab_size")
                }
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a recording of heads: {error}. Make one with record_heads") from error
        self.num_heads, self.vocab_size = self._file["ids"].shape[1], int(self._file["vocab_size"])

    def __len__(self) -> int:
        return len(self._file["prompts"])

    def make(self, key: int) -> Answer:
        """See Answers."""
        start, stop = self._file["starts"][key % len(self) : key % len(self) + 2]
        first = int(self._file["prompts"][key % len(self)])
        tokens, rows = self._file["tokens"][start:stop], slice(start + first - 2, stop - 1)
        return Answer(
            tokens[:first], tokens[first:], self._file["ids"][rows], self._file["logits"][rows].astype(np.float32)
        )


def extrapolate_ranks(accuracy_KR: np.ndarray) -> np.ndarray:
    """Return sorted accuracies [K, RANKS]; ranks beyond the measured ones continue their mean decrease."""
    arrays = -np.sort(-accuracy_KR, axis=1)
    decrease = np.sqrt(arrays[:, -1:] / arrays[:, -3:-2]).clip(0, 0.95)
    beyond = arrays[:, -1:] * decrease ** np.arange(1, RANKS + 1 - arrays.shape[1])
    return np.concatenate([arrays, beyond], axis=1)


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    """Return the cumulative normal distribution, to 1e-7 (Abramowitz and Stegun, 26.2.17)."""
    t = 1 / (1 + 0.2316419 * np.abs(x))
    terms = (0.319381530, -0.356563782, 1.781477937, -1.821255978, 1.330274429)
    tail = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * sum(c * t ** (i + 1) for i, c in enumerate(terms))
    return np.where(x > 0, 1 - tail, tail)
