"""Reductions over logits whose vocabulary is shared out. Full logits never cross the wire.

Every function returns the same bits on every rank, because what it decides from was gathered. Legend: R rows,
V local vocabulary (padded), S ranks, C candidates a rank sends. Ties go to the smallest token id.
"""

from dataclasses import dataclass

import torch

from euryale.kernels import top_k as kernels
from euryale.parallel.group import Group


@dataclass(frozen=True)
class VocabShard:
    """Which token ids this rank's logits are about: ``offset`` to ``offset + V``, of which those below
    ``vocab_size`` exist; the rest is padding."""

    group: Group
    vocab_size: int
    length: int

    @property
    def offset(self) -> int:
        return self.group.rank * self.length

    @property
    def num_valid(self) -> int:
        return max(0, min(self.length, self.vocab_size - self.offset))

    def hide_padding(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """Float32 logits with -inf where no token exists."""
        logits_RV = logits_RV.float()
        if self.num_valid < self.length:
            logits_RV[:, self.num_valid :] = -torch.inf
        return logits_RV

    def pick(self, logits_RV: torch.Tensor, tokens_R: torch.Tensor) -> torch.Tensor:
        """This rank's logit of one token per row, -inf where another rank has it: float32 [R]."""
        local = tokens_R - self.offset
        is_mine = (local >= 0) & (local < self.length)
        values = logits_RV.gather(1, local.clamp(0, self.length - 1)[:, None])[:, 0]
        return torch.where(is_mine, values, -torch.inf)


def best(values_NR: torch.Tensor, ids_NR: torch.Tensor) -> torch.Tensor:
    """The id of the largest value over the first axis, the smallest id among equals: int64 [R]."""
    top = values_NR.max(dim=0).values
    return torch.where(values_NR == top, ids_NR, torch.iinfo(torch.int64).max).min(dim=0).values


def merge(shard: VocabShard, packed: torch.Tensor) -> torch.Tensor:
    """The k largest over all ranks of what each found with ``kernels.top_k`` in its own shard: int32 [2, R, k]. 8 k
    bytes per row and rank."""
    return kernels.merge_top_k(shard.group.all_gather(packed))


def argmax(shard: VocabShard, logits_RV: torch.Tensor) -> torch.Tensor:
    """The token of the largest logit in each row over all ranks: int32 [R]. 8 bytes per row and rank."""
    return merge(shard, kernels.top_k(logits_RV, 1, shard.num_valid, shard.offset))[1, :, 0]


def top_k(shard: VocabShard, logits_RV: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k`` largest logits of each row and their token ids, largest first, packed (see ``kernels.top_k``): int32
    [2, R, k].

    8 k bytes per row and rank. Where the vocabulary has fewer than ``k`` tokens the rest is -inf.
    """
    return merge(shard, kernels.top_k(logits_RV, k, shard.num_valid, shard.offset))


def local_top_k(shard: VocabShard, logits_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's ``k`` largest of each row, padded with -inf where it has fewer tokens."""
    return kernels.values_and_ids(kernels.top_k(logits_RV, k, shard.num_valid, shard.offset))


def pack(floats: list[torch.Tensor], ids: list[torch.Tensor]) -> torch.Tensor:
    """Columns of float32 [R] and of int64 [R] as one int32 tensor [columns, R], to travel in one collective."""
    return torch.stack([f.contiguous().view(torch.int32) for f in floats] + [i.to(torch.int32) for i in ids])


def unpack(packed_SCR: torch.Tensor, num_floats: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The columns of every rank, each [S, R]: float32, then int64."""
    columns = packed_SCR.unbind(1)
    floats = [c.contiguous().view(torch.float32) for c in columns[:num_floats]]
    return floats, [c.to(torch.int64) for c in columns[num_floats:]]
