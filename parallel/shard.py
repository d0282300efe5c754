"""Shard arithmetic: which slices of a full weight a rank holds. Pure numbers, tested without any rank running."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Slices of one axis of a weight. ``ranges`` are (start, stop) in the full tensor, concatenated in order and
    then padded with zeros to ``length``. ``dim`` None means that every rank holds the whole tensor."""

    dim: int | None
    ranges: tuple[tuple[int, int], ...] = ()
    length: int = 0


WHOLE = Shard(None)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def even(total: int, size: int, rank: int, dim: int) -> Shard:
    """Rank's block of ceil(total / size) entries; the last blocks are padded where ``total`` does not divide."""
    length = ceil_div(total, size)
    start = min(rank * length, total)
    return Shard(dim, ((start, min(start + length, total)),), length)


def check_group_size(num_heads: int, size: int) -> None:
    """ValueError, naming the sizes that can work, unless the query heads divide among ``size`` ranks."""
    if num_heads % size:
        possible = [str(n) for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(
            f"{num_heads} query heads cannot be shared by a group of {size}: use a group of {', '.join(possible)}"
        )


def query_heads(num_heads: int, size: int, rank: int) -> range:
    """The query heads of a rank."""
    local = num_heads // size
    return range(rank * local, (rank + 1) * local)


def kv_heads(num_heads: int, num_kv_heads: int, size: int, rank: int) -> list[int]:
    """The KV heads a rank holds, in the order in which equal runs of its query heads use them.

    Where a rank's query heads do not fall into equal runs per KV head (say 6 of 18 heads with 2 KV heads), each
    query head gets a copy of its own. Every rank holds the same number.
    """
    per_kv = num_heads // num_kv_heads
    local = num_heads // size
    used = [head // per_kv for head in query_heads(num_heads, size, rank)]
    if local % per_kv == 0 or per_kv % local == 0:
        return list(dict.fromkeys(used))
    return used


def heads_shard(heads: range | list[int], head_dim: int, dim: int) -> Shard:
    """The entries of whole heads along ``dim``."""
    return Shard(dim, tuple((h * head_dim, (h + 1) * head_dim) for h in heads), len(heads) * head_dim)
