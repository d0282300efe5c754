"""Tree attention by the compiled kernel (cpu.h beside this file)."""

import ctypes
from functools import lru_cache

import torch

from euryale.kernels import cpu
from euryale.kernels.geometry import StepGeometry


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
    """The step as the kernel reads it, made once; it points into the geometry's tensors."""
    step = geometry.prepared.get("tree_attention.cpu")
    if step is None:
        step = geometry.prepared["tree_attention.cpu"] = _prepare(geometry)
    return step


def _prepare(geometry: StepGeometry) -> cpu.Step:
    step = cpu.Step(len(geometry.segments), geometry.page_size, torch.get_num_threads())
    step.row_starts = geometry.starts.data_ptr()
    step.num_certain = geometry.num_certain.data_ptr()
    step.contexts = geometry.contexts.data_ptr()
    step.page_starts = geometry.page_starts.data_ptr()
    step.pages = geometry.pages.data_ptr()
    step.positions = geometry.positions.data_ptr()
    step.ancestors = geometry.ancestors.data_ptr()
    return step
