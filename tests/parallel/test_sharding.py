"""Shard arithmetic for groups of up to 32 ranks, none of them running."""

import pytest
import torch

from euryale.parallel import sharding
from euryale.runtime.model.checkpoint import cut


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("total", [1, 7, 32, 130, 3001, 32000, 151936])
def test_even_shards_hold_every_row_once(total, size):
    whole = torch.arange(1, total + 1)
    parts = [cut(whole, sharding.even(total, size, rank, dim=0)) for rank in range(size)]
    assert len({len(p) for p in parts}) == 1
    joined = torch.cat(parts)
    assert joined[joined > 0].tolist() == whole.tolist()
    assert len(joined) - total < size * len(parts[0])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [
        (32, 8, 1),
        (32, 8, 4),
        (32, 8, 8),
        (32, 8, 16),
        (32, 8, 32),
        (64, 8, 32),
        (12, 4, 6),
        (18, 2, 3),
        (28, 4, 14),
        (4, 2, 4),
    ],
)
def test_every_query_head_finds_its_kv_head(heads, kv_heads, size):
    counts = set()
    for rank in range(size):
        mine, held = sharding.query_heads(heads, size, rank), sharding.kv_heads(heads, kv_heads, size, rank)
        run = len(mine) // len(held)
        assert run * len(held) == len(mine)
        for i, head in enumerate(mine):
            assert held[i // run] == head // (heads // kv_heads)
        counts.add(len(held))
    assert len(counts) == 1, "ranks hold different numbers of KV heads"
    assert [h for rank in range(size) for h in sharding.query_heads(heads, size, rank)] == list(range(heads))


def test_kv_heads_are_shared_out_before_they_are_copied():
    assert [sharding.kv_heads(32, 8, 4, rank) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [sharding.kv_heads(8, 2, 4, rank) for rank in range(4)] == [[0], [0], [1], [1]]


@pytest.mark.parametrize("size", [16, 32])
def test_a_whole_model_is_covered_by_16_and_32_ranks(size):
    """Column, row and head shards of one layer add up to the full product."""
    torch.manual_seed(0)
    heads, kv, dim, width, hidden = 64, 8, 4, 200, 24
    q, o = torch.randn(heads * dim, hidden).double(), torch.randn(hidden, heads * dim).double()
    up, down = torch.randn(width, hidden).double(), torch.randn(hidden, width).double()
    x = torch.randn(hidden).double()
    attended, fed = torch.zeros(hidden).double(), torch.zeros(hidden).double()
    for rank in range(size):
        mine = sharding.query_heads(heads, size, rank)
        q_local = cut(q, sharding.heads_shard(mine, dim, dim=0))
        attended += cut(o, sharding.heads_shard(mine, dim, dim=1)) @ (q_local @ x)
        local = cut(up, sharding.even(width, size, rank, dim=0)) @ x
        fed += cut(down, sharding.even(width, size, rank, dim=1)) @ local
        assert len(sharding.kv_heads(heads, kv, size, rank)) == max(1, kv // size)
    torch.testing.assert_close(attended, o @ (q @ x))
    torch.testing.assert_close(fed, down @ (up @ x))


@pytest.mark.parametrize(("heads", "size"), [(4, 3), (28, 8), (32, 64)])
def test_a_size_that_cannot_work_is_refused_with_those_that_can(heads, size):
    with pytest.raises(ValueError, match=f"use 1, 2, .*{heads}"):
        sharding.check_group_size(heads, size)
