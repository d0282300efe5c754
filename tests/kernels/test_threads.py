"""Work divided among threads: the same bits whatever their number, and whether or not helpers get to run."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import torch

from euryale.kernels import cpu
from euryale.kernels.linear import cpu as linear
from euryale.kernels.linear.quantize import quantize
from euryale.kernels.sample.cpu import sample
from euryale.kernels.threads import num_threads, one_for_torch
from euryale.kernels.top_k.cpu import top_k

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="the CPU kernels are not built")
ROWS, IN, OUT, VOCABULARY = 20, 96, 500, 20_000  # more values than a thread alone is given


def product(kind: str) -> torch.Tensor:
    torch.manual_seed(0)
    weight, x = torch.randn(OUT, IN), torch.randn(ROWS, IN)
    packed = linear.pack(weight if kind == "none" else quantize(weight, kind))
    return linear.linear(x, packed, None, OUT, None)


def largest() -> torch.Tensor:
    return top_k(torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0)), 5, VOCABULARY, 0)


def drawn() -> torch.Tensor:
    logits = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return sample(logits, torch.ones(ROWS), torch.arange(ROWS), VOCABULARY, 0)


CASES = {
    "linear": lambda: product("none"),
    "int8": lambda: product("int8"),
    "top_k": largest,
    "sample": drawn,
}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_core() -> Iterator[None]:
    """Keep this thread on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.parametrize("case", CASES)
def test_results_do_not_depend_on_the_number_of_threads(case, threads):
    threads(1)
    alone = CASES[case]()
    for number in (2, 3, 7):
        threads(number)
        for _ in range(20):  # who claims what differs from call to call
            assert torch.equal(CASES[case](), alone)


@pytest.mark.usefixtures("one_core")
def test_threads_of_one_core_wait_for_each_other_and_end(threads):
    threads(1)
    alone = product("none")
    threads(8)  # helpers that start here inherit the core
    for _ in range(200):
        assert torch.equal(product("none"), alone)


def test_a_forked_child_works_without_the_helpers(threads):
    threads(3)
    packed, x = linear.pack(torch.randn(OUT, IN)), torch.randn(ROWS, IN)
    expected = linear.linear(x, packed, None, OUT, None)
    child = os.fork()
    if child == 0:  # its only thread is this one; large operations of PyTorch would wait for OpenMP's for ever
        os._exit(0 if torch.equal(linear.linear(x, packed, None, OUT, None), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_torch_has_one_thread_inside_and_what_it_had_afterwards(threads):
    threads(3)
    with suppress(KeyError), one_for_torch():
        assert (torch.get_num_threads(), num_threads()) == (1, 3)
        with one_for_torch():
            assert (torch.get_num_threads(), num_threads()) == (1, 3)
        raise KeyError
    assert (torch.get_num_threads(), num_threads()) == (3, 3)
