"""Calls the compiled kernel (cpu.cpp beside this file)."""

import torch

from euryale.kernels import cpu
from euryale.kernels.step_metadata import StepMetadata


def accept(
    metadata: StepMetadata,
    tokens: torch.Tensor,
    next_tokens: torch.Tensor,
    good: torch.Tensor | None,
    scores: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's public function."""
    last_rows = cpu.empty_ids(len(metadata.num_new_tokens))
    commit_slots = cpu.empty(metadata.slots, len(tokens))
    cpu.library().accept(
        cpu.step_of(metadata),
        metadata.parent_rows.data_ptr(),
        metadata.depths.data_ptr(),
        metadata.slots.data_ptr(),
        tokens.data_ptr(),
        next_tokens.data_ptr(),
        None if good is None else good.data_ptr(),
        None if scores is None else scores.data_ptr(),
        last_rows.data_ptr(),
        commit_slots.data_ptr(),
    )
    return last_rows, commit_slots
