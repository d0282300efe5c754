"""Rotary embedding in plain PyTorch, the two halves of a head as the pairs that turn."""

import torch
import torch.nn.functional as F


def rope_qk(q, k, cos, sin, q_norm, k_norm, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's public function."""
    if q_norm is not None:
        q = F.rms_norm(q, q.shape[-1:], q_norm, eps)
        k = F.rms_norm(k, k.shape[-1:], k_norm, eps)
    return _rotate(q, cos[:, None], sin[:, None]), _rotate(k, cos[:, None], sin[:, None])


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
