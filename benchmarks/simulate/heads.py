"""Answers and what Medusa heads say along them, without a model: drawn from published accuracies, or recorded.

**Drawn.** An answer is random tokens; what the heads name is the truth at some rank, and other random tokens. The
published accuracy of head h at rank r (ranks beyond the fifth go on falling as those before them do) is the mean over
positions, of which some are easy and some hard: the chance that the head's likeliest token is right at a position is
``q = low + (1 - low) * Phi(a + SPREAD * z)`` with z standard normal, where ``a`` makes the mean what was published
(the mean of Phi(a + s z) is Phi(a / sqrt(1 + s^2))) and ``low`` keeps the second token from being likelier than the
first. What is left over goes to the other ranks in their published proportions. Logits are the logarithms of just
these chances, so that their softmax is calibrated. Heads hang together: z of a head at a position is a weighted sum
of three independent ones, of the token it guesses (shared by all heads that guess it, from wherever), of the position
it guesses from (shared by all heads there), and its own. SPREAD and the weights are assumed; the published 63-guess
tree comes to 2.45 tokens a step with the published 7B accuracies (independent heads: 2.43; others measured 2.3 to 2.6
on real text).

**Recorded.** Real answers and what real heads named at each of their tokens, from a ``.npz`` (``record_heads.py``).

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
OF_TOKEN, OF_PLACE = 0.5, 0.25  # shares of the variance
_STRIDE = 37  # between the wrong tokens that a head names


@dataclass(frozen=True)
class Answer:
    """``prompt`` int32; ``truth`` int32 [L], the answer; ``ids`` int32 and ``logits`` float32 [L + 1, K, R]: what the
    heads say of the tokens from number n on, once n are known."""

    prompt: np.ndarray
    truth: np.ndarray
    ids: np.ndarray
    logits: np.ndarray

    def head_candidates(self, known: int) -> HeadCandidates:
        """With so many tokens of the answer known."""
        return HeadCandidates(self.ids[known], self.logits[known])


class Answers(Protocol):
    """Where answers come from: the same key always gives the same one. ``num_heads``, and ``vocab_size`` tokens."""

    num_heads: int
    vocab_size: int

    def make(self, key: int) -> Answer: ...


class DrawnAnswers:
    """Answers whose heads are as accurate as published."""

    def __init__(
        self, accuracy_KR: np.ndarray, prompts: range, lengths: range, seed: int = 0, vocab: int = 32000
    ) -> None:
        """``accuracy_KR``: chance of each head's ranks, not cumulated. Lengths in tokens are drawn evenly from the
        ranges."""
        self.num_heads, self.vocab_size = len(accuracy_KR), vocab
        self._prompts, self._lengths, self._seed = prompts, lengths, seed
        self.accuracy_KR = accuracy_KR
        top, others_KR = accuracy_KR[:, 0], all_ranks(accuracy_KR)[:, 1:]
        if np.any(top + others_KR.sum(axis=1) >= 1):
            raise ValueError("a head's accuracies add up to 1 or more: give them by rank, not cumulated")
        self._shares_KR = others_KR / (1 - top)[:, None]
        self._low = self._shares_KR[:, 0] / (1 + self._shares_KR[:, 0])
        means = ((top - self._low) / (1 - self._low)).clip(1e-4, 1 - 1e-4)
        self._middle = np.array([NormalDist().inv_cdf(m) for m in means]) * math.sqrt(1 + SPREAD**2)

    def make(self, key: int) -> Answer:
        """See Answers."""
        rng = np.random.default_rng([self._seed, key])
        prompt = rng.integers(
            self.vocab_size, size=rng.integers(self._prompts.start, self._prompts.stop), dtype=np.int32
        )
        length, heads = int(rng.integers(self._lengths.start, self._lengths.stop)), self.num_heads
        truth = rng.integers(self.vocab_size, size=length + 1 + heads, dtype=np.int32)
        ahead_LK = np.arange(length + 1)[:, None] + np.arange(heads)
        of_token, of_place = rng.standard_normal(len(truth)), rng.standard_normal((length + 1, 1))
        own = rng.standard_normal(ahead_LK.shape)
        z_LK = math.sqrt(OF_TOKEN) * of_token[ahead_LK] + math.sqrt(OF_PLACE) * of_place
        z_LK += math.sqrt(1 - OF_TOKEN - OF_PLACE) * own
        q_LK = self._low + (1 - self._low) * _normal(self._middle + SPREAD * z_LK).clip(0, 1 - 1e-6)
        chances = np.concatenate([q_LK[..., None], (1 - q_LK)[..., None] * self._shares_KR], axis=2)
        # The rank of the truth; RANKS, where it is not named.
        rank_LK = (rng.random((*ahead_LK.shape, 1)) > chances.cumsum(axis=2)).sum(axis=2)
        wanted = truth[ahead_LK][..., None]
        ids = (rng.integers(self.vocab_size, size=(*ahead_LK.shape, 1)) + _STRIDE * np.arange(RANKS)) % self.vocab_size
        ids = np.where(ids == wanted, (ids + 1) % self.vocab_size, ids)
        ids = np.where(np.arange(RANKS) == rank_LK[..., None], wanted, ids).astype(np.int32)
        return Answer(prompt, truth[:length], ids, np.log(chances).astype(np.float32))


class RecordedAnswers:
    """Answers of a real model, each once and then from the first on again."""

    def __init__(self, path: Path) -> None:
        """``.npz`` of N answers: ``starts`` int64 [N + 1] of each in what follows; ``prompts`` int64 [N], tokens of the
        prompt, two at least; ``tokens`` int32 [T], prompt and answer; ``ids`` int32 and ``logits`` float16 or float32
        [T, K, R]: what the heads, run at that token, say of the tokens from two later on; ``vocab_size``."""
        try:
            with np.load(path, allow_pickle=False) as found:
                self._file = {
                    name: found[name] for name in ("starts", "prompts", "tokens", "ids", "logits", "vocab_size")
                }
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no recording of heads: {error}. Make one with record_heads") from error
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


def all_ranks(accuracy_KR: np.ndarray) -> np.ndarray:
    """The same for RANKS ranks, sorted: each beyond the measured ones falls as the last two did in the mean."""
    found = -np.sort(-accuracy_KR, axis=1)
    fall = np.sqrt(found[:, -1:] / found[:, -3:-2]).clip(0, 0.95)
    beyond = found[:, -1:] * fall ** np.arange(1, RANKS + 1 - found.shape[1])
    return np.concatenate([found, beyond], axis=1)


def _normal(x: np.ndarray) -> np.ndarray:
    """The normal distribution's function, to 1e-7 (Abramowitz and Stegun, 26.2.17)."""
    t = 1 / (1 + 0.2316419 * np.abs(x))
    terms = (0.319381530, -0.356563782, 1.781477937, -1.821255978, 1.330274429)
    tail = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * sum(c * t ** (i + 1) for i, c in enumerate(terms))
    return np.where(x > 0, 1 - tail, tail)
