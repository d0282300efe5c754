"""Tree attention by the compiled kernel (cpu.h beside this file)."""

import ctypes
from functools import lru_cache

import numpy as np
import torch

from euryale.kernels import cpu
from euryale.kernels.geometry import StepGeometry, tree_tables

_WORDS = 2  # of ancestor bits


def tree_attention(q, scratch, cache, geometry: StepGeometry, scale: float, window: int | None) -> torch.Tensor:
    """See the package's public function."""
    rows, heads, head_dim = q.shape
    out = cpu.empty(q, rows, heads * head_dim)
    cpu.library().tree_attention(
        ctypes.pointer(prepared_step(geometry)),
        _shape(cpu.DTYPES[q.dtype], heads, scratch.shape[2], head_dim, q.stride(0), window or 0, scale),
        q.data_ptr(),
        *cpu.halves(scratch),
        *cpu.halves(cache),
        out.data_ptr(),
    )
    return out


@lru_cache(maxsize=64)
def _shape(*fields) -> ctypes.Structure:
    return ctypes.pointer(cpu.Attention(*fields))


def prepared_step(geometry: StepGeometry) -> cpu.Step:
    """The step as the kernel reads it, made once; it keeps the arrays it points to alive."""
    step = geometry.prepared.get("tree_attention.cpu")
    if step is None:
        step = geometry.prepared["tree_attention.cpu"] = _prepare(geometry)
    return step


def _prepare(geometry: StepGeometry) -> cpu.Step:
    segments, starts = geometry.segments, geometry.row_starts
    counts = np.asarray([len(s.pages) for s in segments], dtype=np.int64)
    ancestors = np.zeros((geometry.num_rows, _WORDS), dtype=np.uint64)
    for i, segment in enumerate(segments):
        if len(segment.parents):
            _, bits = tree_tables(segment.parents.tobytes())
            ancestors[starts[i] + segment.num_certain - 1 : starts[i + 1], : bits.shape[1]] = bits
    arrays = {
        "row_starts": np.asarray(starts, dtype=np.int64),
        "num_certain": np.asarray([s.num_certain for s in segments], dtype=np.int64),
        "contexts": np.asarray([s.context for s in segments], dtype=np.int64),
        "page_starts": counts.cumsum() - counts,
        "pages": np.concatenate([s.pages for s in segments]).astype(np.int32, copy=False),
        "positions": geometry.positions.numpy(),
        "ancestors": ancestors,
    }
    step = cpu.Step(len(segments), geometry.page_size, torch.get_num_threads())
    for name, array in arrays.items():
        setattr(step, name, array.ctypes.data)
    step.arrays = arrays
    return step
