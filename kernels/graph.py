"""A piece of a step recorded once and replayed in one call, without Python between its kernels.

On a small model, and on a fast GPU, the calls cost as much as what they do. Nothing is described twice: the recording
is what the eager code did, with the same kernels in the same order on the same addresses, so a replay computes the same
bits. What changes from step to step, the recorded function reads from tensors that stay where they are.
"""

import ctypes
from collections.abc import Callable

import torch

from euryale.kernels import backend, cpu

Function = Callable[[], tuple[torch.Tensor, ...]]


class Recording:
    """``function``'s calls of the compiled CPU kernels; other operations on tensors are not repeated, so that it may
    only make views of them. ``out``: its results, until the next replay."""

    def __init__(self, function: Function) -> None:
        recording, library = cpu.Recording(), cpu.library()
        library.record(recording)
        try:
            self.out = function()
        finally:
            library.record(None)
        self._words, self._kept = recording.words(), recording.kept

    def replay(self) -> int:
        """Compute ``out`` again; the status of the call that failed, or 0."""
        return cpu.library().replay(self._words, len(self._words))

    def time(self) -> dict[str, float]:
        """Seconds of one more replay by operation. What it computes means nothing: the inputs were consumed by the
        replay before. All ranks of a group have to call it together."""
        library, names = cpu.library(), []
        while (name := library.recordable_name(len(names))) is not None:
            names.append(name.decode())
        spent = (ctypes.c_int64 * len(names))()
        if library.replay_timed(self._words, len(self._words), spent):
            raise RuntimeError("a recorded collective failed")
        return {name: spent[i] / 1e9 for i, name in enumerate(names) if spent[i]}


class CudaGraph:
    """``function``'s launches on a GPU. All graphs share one pool of memory, which outlives them: one runs after the
    other, and its results are read before the next."""

    _pool: torch.cuda.MemPool | None = None
    _stream: torch.cuda.Stream | None = None  # for what comes before a capture; libraries keep a workspace per stream

    def __init__(self, function: Function) -> None:
        if CudaGraph._pool is None:
            CudaGraph._pool, CudaGraph._stream = torch.cuda.MemPool(), torch.cuda.Stream()
        stream = CudaGraph._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries set up outside of the capture
            self.out = function()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=CudaGraph._pool.id):
            self._captured = function()

    def replay(self) -> int:
        """Compute ``out`` again; always 0: failures show where results are read."""
        self._graph.replay()
        self.out = self._captured
        return 0


def can_record(device: torch.device) -> bool:
    """Whether what runs on this device now can be recorded."""
    return backend.is_compiled(device)


def record(function: Function, device: torch.device) -> Recording | CudaGraph:
    """Run ``function`` and keep it for replays."""
    return CudaGraph(function) if device.type == "cuda" else Recording(function)
