"""The gate of an MLP."""

import torch

from euryale.kernels.backend import implementation


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * up of ``gate_up`` [R, 2 F], gate first: [R, F]."""
    return implementation("silu_mul", gate_up.device).silu_mul(gate_up)
