"""Sharding: which slices of each weight a rank holds.

A model names a style for each of its matrices. ``Layout`` turns a style and a rank into slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from euryale.parallel.group import Group


@dataclass(frozen=True)
class Shard:
    """Slices of a weight along ``dim``; None: every rank holds the whole weight.

    ``ranges``: (start, stop) in the whole weight, concatenated in order and padded with zeros to ``length``.
    """

    dim: int | None
    ranges: tuple[tuple[int, int], ...] = ()
    length: int = 0


WHOLE = Shard(None)


def ceil_div(a: int, b: int) -> int:
    """``a`` / ``b``, rounded up."""
    return -(-a // b)


def even(total: int, size: int, rank: int, dim: int) -> Shard:
    """The rank's block of ceil(total / size) entries along ``dim``. Padding fills the last blocks if ``size`` does not
    divide ``total``."""
    length = ceil_div(total, size)
    start = min(rank * length, total)
    return Shard(dim, ((start, min(start + length, total)),), length)


def check_group_size(num_heads: int, size: int) -> None:
    """ValueError, which lists the possible sizes, unless ``size`` divides the number of query heads."""
    if num_heads % size:
        possible = [str(n) for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(f"{num_heads} query heads cannot be divided among {size} ranks: use {', '.join(possible)}")


def query_heads(num_heads: int, size: int, rank: int) -> range:
    """The query heads of a rank."""
    local = num_heads // size
    return range(rank * local, (rank + 1) * local)


def kv_heads(num_heads: int, num_kv_heads: int, size: int, rank: int) -> list[int]:
    """The KV heads of a rank, in the order in which equal runs of its query heads use them.

    If a rank's query heads do not form equal runs per KV head (6 of 18 heads with 2 KV heads), each query head gets a
    copy of its KV head. All ranks hold the same number.
    """
    per_kv = num_heads // num_kv_heads
    local = num_heads // size
    used = [head // per_kv for head in query_heads(num_heads, size, rank)]
    if local % per_kv == 0 or per_kv % local == 0:
        return list(dict.fromkeys(used))
    return used


def heads_shard(heads: Sequence[int], head_dim: int, dim: int) -> Shard:
    """The entries of whole ``heads`` of ``head_dim`` along ``dim``."""
    return Shard(dim, tuple((h * head_dim, (h + 1) * head_dim) for h in heads), len(heads) * head_dim)


@dataclass(frozen=True)
class Layout:
    """The shards of one rank, for a model with ``num_heads`` query and ``num_total_kv_heads`` KV heads of ``head_dim``.
    ValueError if the group's size does not divide ``num_heads``."""

    group: Group
    num_heads: int
    num_total_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        check_group_size(self.num_heads, self.group.size)

    @property
    def num_query_heads(self) -> int:
        """Query heads of this rank."""
        return len(self._query_heads)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank, copies included."""
        return len(self._kv_heads)

    @property
    def _query_heads(self) -> range:
        return query_heads(self.num_heads, self.group.size, self.group.rank)

    @property
    def _kv_heads(self) -> list[int]:
        return kv_heads(self.num_heads, self.num_total_kv_heads, self.group.size, self.group.rank)

    def shards(self, style: str, out_features: int, in_features: int) -> tuple[Shard, Shard]:
        """The shards of a weight [out, in] and of its bias [out]. KeyError for an unknown ``style``."""
        size, rank = self.group.size, self.group.rank
        if style == "whole":
            return WHOLE, WHOLE
        if style in ("column", "vocabulary"):
            part = even(out_features, size, rank, dim=0)
            return part, part
        if style == "row":
            return even(in_features, size, rank, dim=1), WHOLE
        if style == "query_heads_in":
            return heads_shard(self._query_heads, self.head_dim, dim=1), WHOLE
        heads = {"query_heads": self._query_heads, "kv_heads": self._kv_heads}[style]
        part = heads_shard(heads, self.head_dim, dim=0)
        return part, part
