"""Collectives among the CPU ranks of one host through shared memory (shared_memory.cpp beside this file).

The memory has no name in a file system. The leader creates it, the others open it through /proc, and the kernel frees
it when the last rank has ended, in whatever way.
"""

import os
from functools import cache
from pathlib import Path

import torch

from euryale.kernels import cpu
from euryale.kernels.cpu.native import Library

CAPACITY = 1 << 20  # bytes of a rank's buffer, a multiple of 64; longer messages are sent in pieces
_TIMED_OUT, _CLOSED = -1, -2


class RankLost(RuntimeError):
    """Another rank died, or did not join a collective within the timeout. The group must stop."""


@cache
def library() -> Library:
    """The compiled library with the functions of collectives.def. OSError if it was built from other sources."""
    found = cpu.library()
    try:
        found.add("euryale_collectives", Path(__file__).with_name("collectives.def"))
    except OSError as error:
        raise OSError(f"run 'python -m pip install -e .' to build the collectives again: {error}") from error
    return found


def create(size: int) -> int:
    """Creates shared memory for ``size`` ranks and returns its file descriptor. OSError if that fails."""
    fd = os.memfd_create("euryale", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, library().shared_bytes(size, CAPACITY))
    except OSError:
        os.close(fd)
        raise
    return fd


def open_of(pid: int, fd: int) -> int:
    """Opens descriptor ``fd`` of process ``pid`` and returns a descriptor of this process. OSError if it cannot see the
    files of ``pid``."""
    return os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


class SharedMemoryCollectives:
    """A rank's end of the shared memory.

    Collectives take CPU tensors and return the same bits on every rank. They raise RankLost after ``timeout`` seconds,
    and at once if another rank's process ends.
    """

    def __init__(self, fd: int, rank: int, size: int, timeout: float, may_spin: bool) -> None:
        """Take ownership of ``fd``. ``may_spin``: every rank has a core of its own, so busy waiting costs nothing.
        OSError if the memory cannot be mapped or locked."""
        self._size, self._timeout = size, timeout
        self._handle = library().shared_attach(fd, None, rank, size, CAPACITY, int(timeout * 1e9), may_spin)
        if not self._handle:
            os.close(fd)
            raise OSError("the shared memory cannot be mapped or locked")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Replaces ``x``, float32 or bfloat16, by its sum over the ranks, computed in float32 in rank order."""
        x = x.contiguous()
        self.check(library().shared_all_reduce(self._handle, cpu.DTYPES[x.dtype], x.numel(), x.data_ptr()))
        return x

    def all_reduce_add_rms_norm(
        self, partial_sum: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ``kernels.add_rms_norm`` of the sum of the ranks' ``partial_sum`` [T, D] in one call."""
        normed = cpu.empty(partial_sum, *partial_sum.shape)
        problem = library().shared_all_reduce_add_rms_norm(
            self._handle,
            cpu.DTYPES[partial_sum.dtype],
            *partial_sum.shape,
            partial_sum.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            eps,
            normed.data_ptr(),
        )
        self.check(problem)
        return normed, partial_sum

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Returns every rank's ``x`` [...], stacked in rank order: [size, ...]."""
        x = x.contiguous()
        out = cpu.empty(x, self._size, *x.shape)
        self.check(library().shared_all_gather(self._handle, x.nbytes, x.data_ptr(), out.data_ptr()))
        return out

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Replaces ``x`` by the leader's."""
        self.check(library().shared_broadcast(self._handle, 0, x.nbytes, x.data_ptr()))
        return x

    def close(self) -> None:
        """Leaves the group. May be called twice."""
        if self._handle:
            library().shared_detach(self._handle)
            self._handle = None

    def check(self, problem: int) -> None:
        """Raises RankLost if a call's status ``problem`` is not 0."""
        if problem == _TIMED_OUT:
            raise RankLost(f"a rank did not join a collective within {self._timeout:.0f} s (--step-timeout)")
        if problem == _CLOSED:
            raise RankLost("this rank has left the group")
        if problem:
            raise RankLost(f"rank {problem - 1} is gone")
