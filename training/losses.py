"""Targets of heads and backbone at every position, and losses as sums over positions.

Shape suffixes: B windows, L positions, N rows, D hidden, V vocabulary, K heads, R ranks.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from euryale.training.packing import Batch

IGNORED = -100
_CHUNK = 1 << 26  # logits computed at once; with more, chunks are recomputed for the gradient
TOP_RANKS = 5


def next_tokens(batch: Batch, argmax_BL: torch.Tensor | None = None) -> torch.Tensor:
    """Return the target of the backbone at every position, int64 [B, L].

    The target is the text's next token, or that of ``argmax_BL``, the backbone's own prediction. It is IGNORED where
    the next token is outside the loss mask or in another document.
    """
    targets = torch.full_like(batch.tokens, IGNORED)
    follows = batch.learned[:, 1:] & (batch.documents[:, 1:] == batch.documents[:, :-1])
    followers_BL = batch.tokens[:, 1:] if argmax_BL is None else argmax_BL[:, :-1]
    targets[:, :-1] = torch.where(follows, followers_BL, IGNORED)
    return targets


def head_targets(targets_BL: torch.Tensor, documents_BL: torch.Tensor, head: int) -> torch.Tensor:
    """Return the target of ``head`` at every position t, int64 [B, L].

    It is the backbone's target at t + 1 + head, or IGNORED if that position is in another document.
    """
    ahead = head + 1
    shifted = torch.full_like(targets_BL, IGNORED)
    same = documents_BL[:, ahead:] == documents_BL[:, :-ahead]
    shifted[:, :-ahead] = torch.where(same, targets_BL[:, ahead:], IGNORED)
    return shifted


def num_targets(batch: Batch, num_heads: int) -> torch.Tensor:
    """Return the number of positions with a target for the backbone and for every head, int64 [1 + K]."""
    documents, learned = batch.documents, batch.learned
    ahead = range(1, num_heads + 2)
    return torch.stack([(learned[:, a:] & (documents[:, a:] == documents[:, :-a])).sum() for a in ahead])


def _in_chunks(function: Callable, rows: int, width: int, *tensors: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``function`` over chunks of rows; ``width``: numbers computed per row.

    Intermediate results of a chunk are recomputed for the gradient.
    """
    if rows * width <= _CHUNK:
        return function(*tensors)
    size = max(1, _CHUNK // width)
    chunks = zip(*(t.split(size) for t in tensors), strict=True)
    return functools.reduce(torch.add, (checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks))


def cross_entropy(logits_of: Callable, x_BLD: torch.Tensor, targets_BL: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the cross-entropy of ``logits_of(x)`` in nats, summed over the positions with a target."""

    def summed(x_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_of(x_ND).float(), targets_N, ignore_index=IGNORED, reduction="sum")

    return _in_chunks(summed, targets_BL.numel(), vocab_size, x_BLD.flatten(0, 1), targets_BL.flatten())


def divergence(
    logits_of: Callable, x_BLD: torch.Tensor, teacher_BLD: torch.Tensor, targets_BL: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Return KL(teacher || student) in nats, summed over the positions with a target.

    Both hidden states go through the same ``logits_of`` (paper, section 2.3.2).
    """

    def summed(x_ND: torch.Tensor, teacher_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_NV = logits_of(teacher_ND).float().log_softmax(-1)
        student_NV = logits_of(x_ND).float().log_softmax(-1)
        return (F.kl_div(student_NV, teacher_NV, reduction="none", log_target=True).sum(-1) * (targets_N >= 0)).sum()

    rows = (x_BLD.flatten(0, 1), teacher_BLD.flatten(0, 1), targets_BL.flatten())
    return _in_chunks(summed, targets_BL.numel(), vocab_size, *rows)


@torch.no_grad()
def argmax_tokens(logits_of: Callable, x_BLD: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the most probable next token at every position, int64 [B, L]."""
    parts = x_BLD.flatten(0, 1).split(max(1, _CHUNK // vocab_size))
    return torch.cat([logits_of(part).argmax(-1) for part in parts]).view(x_BLD.shape[:2])


def rank_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the rank of ``tokens`` [...] in ``logits`` [..., V], int64 [...]: the number of tokens before it.

    Of equal logits, which are common in bfloat16, the smallest id comes first, as in serving.
    """
    logits = logits.nan_to_num(math.inf, math.inf, -math.inf)  # NaN compares as false: count it as the largest
    true = logits.gather(-1, tokens[..., None])
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return ((logits > true) | ((logits == true) & (ids < tokens[..., None]))).sum(-1)


@torch.no_grad()
def count_ranks(logits_of: Callable, x_BLD: torch.Tensor, targets_BL: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return how often the target has rank 0 to R - 1, int64 [R]."""

    def counted(x_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        ranks_N = rank_of(logits_of(x_ND), targets_N.clamp(min=0))[targets_N >= 0]
        return torch.stack([(ranks_N == rank).sum() for rank in range(TOP_RANKS)])

    return _in_chunks(counted, targets_BL.numel(), vocab_size, x_BLD.flatten(0, 1), targets_BL.flatten())
