"""Collectives among CPU ranks of one host, through memory that they share (shared_memory.cpp beside this file).

The memory has no name in any file system: the leader makes it, the others open it through /proc, and when the last
rank is gone, however it went, so is the memory.
"""

import os

import torch

from euryale.kernels import cpu

CAPACITY = 1 << 20  # bytes of a rank's buffer, a multiple of 64; longer messages travel in pieces
_TIMED_OUT, _CLOSED = -1, -2


class RankLost(RuntimeError):
    """Another rank died, or did not come within the time allowed: the group must not go on."""


def create(size: int) -> int:
    """File descriptor of new shared memory for ``size`` ranks."""
    fd = os.memfd_create("euryale", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, cpu.library().shared_bytes(size, CAPACITY))
    except OSError:
        os.close(fd)
        raise
    return fd


def open_of(pid: int, fd: int) -> int:
    """A descriptor of our own for process ``pid``'s ``fd``. OSError where its files cannot be seen."""
    return os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


class SharedMemory:
    """This rank's end. Every method takes CPU tensors and returns the same bits on every rank; all raise RankLost
    instead of waiting longer than the timeout, and within a moment if another rank's process ends."""

    def __init__(self, fd: int, rank: int, size: int, timeout: float, may_spin: bool) -> None:
        """Take over ``fd``. ``may_spin``: every rank has a core to itself, so that waiting on it takes nobody's time.
        OSError if the memory cannot be used."""
        self._size, self._timeout = size, timeout
        self._handle = cpu.library().shared_attach(fd, None, rank, size, CAPACITY, int(timeout * 1e9), may_spin)
        if not self._handle:
            os.close(fd)
            raise OSError("the memory shared by the ranks of this host cannot be mapped or locked")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of float32 or bfloat16 ``x`` over the ranks, in float32 and in their order; takes the place of ``x``."""
        x = x.contiguous()
        self.check(cpu.library().shared_all_reduce(self._handle, cpu.DTYPES[x.dtype], x.numel(), x.data_ptr()))
        return x

    def all_reduce_add_rms_norm(
        self, share: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``kernels.add_rms_norm`` of the sum of the ranks' ``share`` [T, D], in one call."""
        normed = cpu.empty(share, *share.shape)
        problem = cpu.library().shared_all_reduce_add_rms_norm(
            self._handle,
            cpu.DTYPES[share.dtype],
            *share.shape,
            share.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            eps,
            normed.data_ptr(),
        )
        self.check(problem)
        return normed, share

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x`` [...], stacked in rank order: [size, ...]."""
        x = x.contiguous()
        out = cpu.empty(x, self._size, *x.shape)
        self.check(cpu.library().shared_all_gather(self._handle, x.nbytes, x.data_ptr(), out.data_ptr()))
        return out

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """The leader's ``x``, which takes the place of the others'."""
        self.check(cpu.library().shared_broadcast(self._handle, 0, x.nbytes, x.data_ptr()))
        return x

    def close(self) -> None:
        """Leave. May be called twice."""
        if self._handle:
            cpu.library().shared_detach(self._handle)
            self._handle = None

    def check(self, problem: int) -> None:
        """Raise RankLost unless the status ``problem`` of a call is 0."""
        if problem == _TIMED_OUT:
            raise RankLost(f"a rank did not come to a collective within {self._timeout:.0f} s (--step-timeout)")
        if problem == _CLOSED:
            raise RankLost("this rank has left the group")
        if problem:
            raise RankLost(f"rank {problem - 1} is gone")
