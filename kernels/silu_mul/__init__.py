"""Applies the gate of an MLP."""

import torch

from euryale.kernels.backend import implementation


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Returns SiLU(gate) * up [R, F] for ``gate_up`` [R, 2 F], float32 or bfloat16; the gate comes first."""
    return implementation("silu_mul", gate_up.device).silu_mul(gate_up)
