"""Collectives among real ranks."""

import numpy as np
import pytest
import torch

from euryale.parallel.group import PLAN_HEAD, single


def collect(group):
    x = torch.tensor([1.0, 10.0]) * (group.rank + 1)
    low = group.all_reduce(x.bfloat16())
    gathered = group.all_gather(torch.tensor([[group.rank, 7]]))
    return (
        group.all_reduce(x.clone()).tolist(),
        str(low.dtype),
        gathered.tolist(),
        group.minimum(5 - group.rank),
    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_collectives(ranks, size):
    total = sum(range(1, size + 1))
    for summed, dtype, gathered, minimum in ranks(size).run(collect):
        assert summed == [total, 10 * total]
        assert dtype == "torch.bfloat16"
        assert gathered == [[[rank, 7]] for rank in range(size)]
        assert minimum == 5 - (size - 1)


def send(group, length):
    buffer = np.arange(length, dtype=np.int32) if group.is_leader else None
    return group.broadcast(buffer).tolist()


@pytest.mark.parametrize("length", [1, PLAN_HEAD - 1, PLAN_HEAD, PLAN_HEAD + 1, 5000])
def test_a_plan_arrives_whole_whatever_its_length(ranks, length):
    assert ranks(2).run(send, length) == [list(range(length))] * 2


def disagree(group):
    try:
        group.agree("rank 1 has no file" if group.rank == 1 else None)
    except ValueError as error:
        return str(error)
    return "no error"


def test_an_error_on_one_rank_is_an_error_on_all(ranks):
    assert ranks(4).run(disagree) == ["rank 1 has no file"] * 4
    single().agree(None)
    with pytest.raises(ValueError, match="broken"):
        single().agree("broken")


def compare(group):
    """The ranks differ in the second fact, of which rank 1 has another."""
    group.agree_on({"--first": 1, "--third": "x"})
    try:
        group.agree_on({"--first": 1, "--second": group.rank == 1, "--third": "x" * group.rank})
    except ValueError as error:
        return str(error)
    return "no error"


def test_ranks_that_differ_are_named(ranks):
    first, second, third = ranks(3).run(compare)
    assert "--second is False on rank 0 and differs on 1;" in first
    assert "--second is True on rank 1 and differs on 0, 2;" in second
    assert "--second is False on rank 2" in third
    single().agree_on({"--first": 1})


def fail_on_one(group):
    try:
        with group.agreed(KeyError):
            if group.rank == 1:
                raise KeyError("lost")
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_failure_on_one_rank_is_heard_on_all(ranks):
    assert ranks(2).run(fail_on_one) == ["'lost'", "'lost'"]
    with pytest.raises(ZeroDivisionError), single().agreed():
        raise ZeroDivisionError  # not an error to agree on: a fault of ours
