"""The walk by the compiled kernel (cpu.cpp beside this file)."""

import ctypes

import torch

from euryale.kernels import cpu
from euryale.kernels.geometry import StepGeometry


def accept(geometry: StepGeometry, tokens, next_tokens, good, scores) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's public function."""
    last, kept = cpu.empty_ids(len(geometry.num_new_tokens)), cpu.empty(geometry.slots, len(tokens))
    cpu.library().accept(
        ctypes.pointer(cpu.step_of(geometry)),
        geometry.parent_rows.data_ptr(),
        geometry.depths.data_ptr(),
        geometry.slots.data_ptr(),
        tokens.data_ptr(),
        next_tokens.data_ptr(),
        None if good is None else good.data_ptr(),
        None if scores is None else scores.data_ptr(),
        last.data_ptr(),
        kept.data_ptr(),
    )
    return last, kept
