"""Sharding styles: the words in which a model says, as data, how its matrices are shared out."""

from dataclasses import dataclass

from euryale.parallel import shard
from euryale.parallel.group import Group
from euryale.parallel.shard import WHOLE, Shard


@dataclass(frozen=True)
class Layout:
    """One rank's share of a model with ``num_heads`` query and ``num_total_kv_heads`` KV heads of ``head_dim``."""

    group: Group
    num_heads: int
    num_total_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        shard.check_group_size(self.num_heads, self.group.size)

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
        return shard.query_heads(self.num_heads, self.group.size, self.group.rank)

    @property
    def _kv_heads(self) -> list[int]:
        return shard.kv_heads(self.num_heads, self.num_total_kv_heads, self.group.size, self.group.rank)

    def shards(self, style: str, out_features: int, in_features: int) -> tuple[Shard, Shard]:
        """The shards of a weight [out, in] and of its bias [out]."""
        size, rank = self.group.size, self.group.rank
        if style == "whole":
            return WHOLE, WHOLE
        if style in ("column", "vocabulary"):
            part = shard.even(out_features, size, rank, dim=0)
            return part, part
        if style == "row":
            return shard.even(in_features, size, rank, dim=1), WHOLE
        if style == "query_heads_in":
            return shard.heads_shard(self._query_heads, self.head_dim, dim=1), WHOLE
        heads = {"query_heads": self._query_heads, "kv_heads": self._kv_heads}[style]
        part = shard.heads_shard(heads, self.head_dim, dim=0)
        return part, part
