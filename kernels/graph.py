"""Records part of a step once and replays it in one call, without Python between its kernels.

On a small model or a fast GPU, launching kernels takes as long as running them. A recording is what the eager code
did: the same kernels in the same order on the same addresses, so a replay computes the same bits. Inputs that change
from step to step stay at the same addresses.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from euryale.kernels import backend, cpu
from euryale.kernels.cpu.recording import RecordedCalls

Function = Callable[[], tuple[torch.Tensor, ...]]


class Recording:
    """The calls that ``function`` makes to compiled CPU kernels. A replay repeats no other tensor operations, so
    ``function`` may otherwise only make views. ``out``: its results, valid until the next replay."""

    def __init__(self, function: Function) -> None:
        recording, library = RecordedCalls(), cpu.library()
        library.record(recording)
        try:
            self.out = function()
        finally:
            library.record(None)
        self._words, self._names, self._kept = recording.words(), recording.names, recording.kept

    def replay(self) -> int:
        """Compute ``out`` again. Returns the status of the call that failed, or 0."""
        status: int = cpu.library().replay(self._words, len(self._words))
        return status

    def time(self) -> dict[str, float]:
        """Seconds of one more replay by operation. Its results are meaningless, because the replay before consumed the
        inputs. All ranks of a group must call it together. RuntimeError if a collective failed."""
        nanoseconds = (ctypes.c_int64 * len(self._names))()
        if cpu.library().replay_timed(self._words, len(self._words), nanoseconds):
            raise RuntimeError("a recorded collective failed")
        seconds = dict.fromkeys(self._names, 0.0)
        for name, spent in zip(self._names, nanoseconds, strict=True):
            seconds[name] += spent / 1e9
        return seconds


class CudaGraph:
    """The launches of ``function`` on a GPU. All graphs share one memory pool that outlives them: only one graph runs
    at a time, and its results are read before the next one runs."""

    def __init__(self, function: Function) -> None:
        pool, stream = _shared_pool()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels and sets up libraries before the capture
            self.out = function()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool.id):  # type: ignore[arg-type]  # the NewType of ids is private
            self._captured = function()

    def replay(self) -> int:
        """Compute ``out`` again. Returns 0 in any case: failures show when the results are read."""
        self._graph.replay()
        self.out = self._captured
        return 0


@cache
def _shared_pool() -> tuple[torch.cuda.MemPool, torch.cuda.Stream]:
    """The memory pool of all graphs, and one stream for warm-up: libraries keep a workspace per stream."""
    return torch.cuda.MemPool(), torch.cuda.Stream()


def can_record(device: torch.device) -> bool:
    """Whether the implementation in use on ``device`` can be recorded."""
    return backend.is_compiled(device)


def record(function: Function, device: torch.device) -> Recording | CudaGraph:
    """Run ``function`` on ``device`` and record it. RuntimeError if it calls something that cannot be recorded."""
    return CudaGraph(function) if device.type == "cuda" else Recording(function)
