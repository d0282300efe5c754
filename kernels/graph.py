"""A piece of a step recorded once and replayed in one call, without Python between its kernels.

On a small model the calls cost as much as what they do. Nothing is described twice: the recording is what the eager
code did, with the same kernels in the same order on the same addresses, so a replay computes the same bits.
"""

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

from euryale.kernels import backend, cpu
from euryale.kernels.geometry import StepGeometry
from euryale.kernels.tree_attention.cpu import prepared_step

Function = Callable[[torch.Tensor, StepGeometry], torch.Tensor]


class _Graph:
    """``function`` of ``x`` [R, ...] and a geometry of R rows, recorded as it runs, on buffers of its own. ``out`` is
    its result until the next replay."""

    def __init__(self, function: Function, x: torch.Tensor, geometry: StepGeometry) -> None:
        self._x, self._positions = x.clone(), geometry.positions.clone()
        self._step, self._geometry = cpu.Step.from_buffer_copy(prepared_step(geometry)), geometry
        recording, library = cpu.Recording(), cpu.library()
        library.record(recording)
        try:
            self.out = function(self._x, geometry.on_buffers(self._positions, self._step))
        finally:
            library.record(None)
        self._words, self._kept = recording.words(), recording.kept

    def replay(self, x: torch.Tensor, geometry: StepGeometry) -> int:
        """Compute ``out`` again for another input; the status of the call that failed, or 0."""
        self._x.copy_(x)
        self._positions.copy_(geometry.positions)
        self._geometry = geometry  # the step points into its tensors
        ctypes.memmove(ctypes.addressof(self._step), ctypes.addressof(prepared_step(geometry)), ctypes.sizeof(cpu.Step))
        return cpu.library().replay(self._words, len(self._words))

    def time(self) -> dict[str, float]:
        """Seconds of one more replay by operation. What it computes means nothing: the input was consumed by the replay
        before. All ranks of a group have to call it together."""
        library, names = cpu.library(), []
        while (name := library.recordable_name(len(names))) is not None:
            names.append(name.decode())
        spent = (ctypes.c_int64 * len(names))()
        if library.replay_timed(self._words, len(self._words), spent):
            raise RuntimeError("a recorded collective failed")
        return {name: spent[i] / 1e9 for i, name in enumerate(names) if spent[i]}


class Graphs:
    """Graphs of one function, one for each number of rows, made when first wanted."""

    def __init__(self, function: Function, max_rows: int, max_graphs: int = 32) -> None:
        """``max_rows``: more rows run eagerly; there the kernels' own work outweighs the calls."""
        self._function, self._max_rows, self._max_graphs = function, max_rows, max_graphs
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()

    def graph(self, rows: int) -> _Graph | None:
        """The graph of so many rows, if there is one."""
        return self._graphs.get((rows, torch.get_num_threads()))

    def __call__(self, x: torch.Tensor, geometry: StepGeometry) -> tuple[torch.Tensor, int]:
        """The function's result, valid until the next call, and 0 or the status of the call that failed."""
        if len(x) > self._max_rows or not backend.is_compiled(x.device):
            return self._function(x, geometry), 0
        key = (len(x), torch.get_num_threads())
        graph, status = self.graph(len(x)), 0
        if graph is not None:
            self._graphs.move_to_end(key)
            status = graph.replay(x, geometry)
        else:
            if len(self._graphs) == self._max_graphs:
                self._graphs.popitem(last=False)
            graph = self._graphs[key] = _Graph(self._function, x, geometry)
        return graph.out, status
