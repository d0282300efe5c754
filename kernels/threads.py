"""The number of threads of a CPU step: our kernels' and that of PyTorch's own operations."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_threads: int | None = None  # of our kernels, where PyTorch's number is another


def num_threads() -> int:
    """Return the number of threads of our kernels: PyTorch's outside of ``one_for_torch``."""
    return _threads or torch.get_num_threads()


@contextmanager
def one_for_torch() -> Iterator[None]:
    """Run PyTorch's operations on the calling thread only, and our kernels on as many threads as before.

    A step's operations of PyTorch are small. Its threads spin while they wait, also between operations: beside other
    work a step would wait for threads that do not run, and our own threads would lack the cores.
    """
    global _threads
    of_torch = torch.get_num_threads()
    before, _threads = _threads, num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(of_torch)
        _threads = before
