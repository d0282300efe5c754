"""Reductions over logits whose vocabulary is sharded. Ranks never exchange full logits.

All functions except ``local_top_k`` return the same bits on every rank, because they reduce gathered numbers. Legend: R
rows, V local vocabulary (padded), S ranks, C columns that a rank sends. The smallest token id wins ties.
"""

from dataclasses import dataclass

import torch

from euryale.kernels import top_k as kernels
from euryale.parallel.group import Group


@dataclass(frozen=True)
class VocabShard:
    """The token ids of this rank's logits: ``length`` ids from ``offset`` on, padding from ``vocab_size`` on."""

    group: Group
    vocab_size: int
    length: int

    @property
    def offset(self) -> int:
        """The token id of this rank's first column."""
        return self.group.rank * self.length

    @property
    def num_valid(self) -> int:
        """The number of columns that are not padding."""
        return max(0, min(self.length, self.vocab_size - self.offset))

    def hide_padding(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """Returns the logits as float32 [R, V] with -inf in padding. May modify ``logits_RV``."""
        logits_RV = logits_RV.float()
        if self.num_valid < self.length:
            logits_RV[:, self.num_valid :] = -torch.inf
        return logits_RV

    def pick(self, logits_RV: torch.Tensor, tokens_R: torch.Tensor) -> torch.Tensor:
        """Returns the logit of one token id per row, int64 [R], or -inf where another rank holds it: [R]."""
        local = tokens_R - self.offset
        is_mine = (local >= 0) & (local < self.length)
        values = logits_RV.gather(1, local.clamp(0, self.length - 1)[:, None])[:, 0]
        return torch.where(is_mine, values, -torch.inf)


def best(values_NR: torch.Tensor, ids_NR: torch.Tensor) -> torch.Tensor:
    """Returns the int64 id of the largest value along the first axis, the smallest id among equals: [R]."""
    top = values_NR.max(dim=0).values
    return torch.where(values_NR == top, ids_NR, torch.iinfo(torch.int64).max).min(dim=0).values


def merge(shard: VocabShard, packed: torch.Tensor) -> torch.Tensor:
    """Merges the ranks' results of ``kernels.top_k``, int32 [2, R, k], into the k largest: int32 [2, R, k]. A rank
    sends 8 k bytes per row."""
    return kernels.merge_top_k(shard.group.all_gather(packed))


def argmax(shard: VocabShard, logits_RV: torch.Tensor) -> torch.Tensor:
    """Returns the token id of each row's largest logit over all ranks: int32 [R]. A rank sends 8 bytes per row."""
    return merge(shard, kernels.top_k(logits_RV, 1, shard.num_valid, shard.offset))[1, :, 0]


def top_k(shard: VocabShard, logits_RV: torch.Tensor, k: int) -> torch.Tensor:
    """Returns each row's ``k`` largest logits over all ranks and their token ids, in descending order, packed as by
    ``kernels.top_k``: int32 [2, R, k].

    A rank sends 8 k bytes per row. Entries beyond the size of the vocabulary are -inf. ValueError if ``k`` is below 1.
    """
    return merge(shard, kernels.top_k(logits_RV, k, shard.num_valid, shard.offset))


def local_top_k(shard: VocabShard, logits_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns this rank's ``k`` largest logits of each row, float32 [R, k], and their token ids, int32 [R, k]. Entries
    beyond the size of its shard are -inf. ValueError if ``k`` is below 1."""
    return kernels.values_and_ids(kernels.top_k(logits_RV, k, shard.num_valid, shard.offset))


def pack(floats: list[torch.Tensor], ids: list[torch.Tensor]) -> torch.Tensor:
    """Packs columns of float32 [R] and int64 [R] into one int32 tensor [columns, R], to send in one collective."""
    return torch.stack([f.contiguous().view(torch.int32) for f in floats] + [i.to(torch.int32) for i in ids])


def unpack(packed_SCR: torch.Tensor, num_floats: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Unpacks int32 [S, columns, R]: the first ``num_floats`` columns as float32 [S, R], the others as int64 [S, R]."""
    columns = packed_SCR.unbind(1)
    floats = [c.contiguous().view(torch.float32) for c in columns[:num_floats]]
    return floats, [c.to(torch.int64) for c in columns[num_floats:]]
