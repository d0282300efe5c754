"""What heads and backbone are taught at every position, and the losses, as sums over positions.

Shape suffixes: B windows, L positions, N rows, D hidden, V vocabulary, K heads, R ranks.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
_CHUNK = 1 << 26  # logits computed at once; beyond that they are computed again for the gradients
TOP_RANKS = 5


def next_tokens(batch, choices_BL: torch.Tensor | None = None) -> torch.Tensor:
    """What follows every position, int64 [B, L]: the text's next token, or the backbone's ``choices``. IGNORED where
    the next token is not learned or belongs to another document."""
    targets = torch.full_like(batch.tokens, IGNORED)
    follows = batch.learned[:, 1:] & (batch.documents[:, 1:] == batch.documents[:, :-1])
    wanted = batch.tokens[:, 1:] if choices_BL is None else choices_BL[:, :-1]
    targets[:, :-1] = torch.where(follows, wanted, IGNORED)
    return targets


def head_targets(targets_BL: torch.Tensor, documents_BL: torch.Tensor, head: int) -> torch.Tensor:
    """What ``head`` should say at every position t, the target of t + 1 + head if that is the same document."""
    ahead = head + 1
    shifted = torch.full_like(targets_BL, IGNORED)
    same = documents_BL[:, ahead:] == documents_BL[:, :-ahead]
    shifted[:, :-ahead] = torch.where(same, targets_BL[:, ahead:], IGNORED)
    return shifted


def num_targets(batch, num_heads: int) -> torch.Tensor:
    """How many positions of a batch have a target for the backbone and for every head, int64 [1 + K]."""
    documents, learned = batch.documents, batch.learned
    ahead = range(1, num_heads + 2)
    return torch.stack([(learned[:, a:] & (documents[:, a:] == documents[:, :-a])).sum() for a in ahead])


def _in_chunks(function: Callable, rows: int, width: int, *tensors: torch.Tensor) -> torch.Tensor:
    """Sum of ``function`` over chunks of rows small enough for ``width`` numbers each, which are not kept."""
    if rows * width <= _CHUNK:
        return function(*tensors)
    size = max(1, _CHUNK // width)
    chunks = zip(*(t.split(size) for t in tensors), strict=True)
    return sum(checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks)


def cross_entropy(logits_of: Callable, x_BLD: torch.Tensor, targets_BL: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Sum over the positions with a target of the cross-entropy, nats, of ``logits_of(x)``."""

    def summed(x_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_of(x_ND).float(), targets_N, ignore_index=IGNORED, reduction="sum")

    return _in_chunks(summed, targets_BL.numel(), vocab_size, x_BLD.flatten(0, 1), targets_BL.flatten())


def divergence(
    logits_of: Callable, x_BLD: torch.Tensor, teacher_BLD: torch.Tensor, targets_BL: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Sum over the positions with a target of KL(teacher || student) in nats, both through the same ``logits_of``
    (paper, section 2.3.2)."""

    def summed(x_ND: torch.Tensor, teacher_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted_NV = logits_of(teacher_ND).float().log_softmax(-1)
        said_NV = logits_of(x_ND).float().log_softmax(-1)
        return (F.kl_div(said_NV, wanted_NV, reduction="none", log_target=True).sum(-1) * (targets_N >= 0)).sum()

    rows = (x_BLD.flatten(0, 1), teacher_BLD.flatten(0, 1), targets_BL.flatten())
    return _in_chunks(summed, targets_BL.numel(), vocab_size, *rows)


@torch.no_grad()
def choices(logits_of: Callable, x_BLD: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The likeliest token after every position, int64 [B, L]."""
    parts = x_BLD.flatten(0, 1).split(max(1, _CHUNK // vocab_size))
    return torch.cat([logits_of(part).argmax(-1) for part in parts]).view(x_BLD.shape[:2])


def rank_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How many tokens stand before ``tokens`` [...] in the order of ``logits`` [..., V], int64 [...]. Of equal logits,
    which bfloat16 has many of, the smallest id comes first, as when serving."""
    logits = logits.nan_to_num(math.inf, math.inf, -math.inf)  # what is no number must not look like a good guess
    true = logits.gather(-1, tokens[..., None])
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return ((logits > true) | ((logits == true) & (ids < tokens[..., None]))).sum(-1)


@torch.no_grad()
def hits(logits_of: Callable, x_BLD: torch.Tensor, targets_BL: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """How often the target is the likeliest token, the second, ...: int64 [R]."""

    def counted(x_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        ranks_N = rank_of(logits_of(x_ND), targets_N.clamp(min=0))[targets_N >= 0]
        return torch.stack([(ranks_N == rank).sum() for rank in range(TOP_RANKS)])

    return _in_chunks(counted, targets_BL.numel(), vocab_size, x_BLD.flatten(0, 1), targets_BL.flatten())
