"""The gate in plain PyTorch."""

import torch
import torch.nn.functional as F


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See the package's public function."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
