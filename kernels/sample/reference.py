"""Gumbel-max sampling in plain PyTorch."""

import torch

from euryale.kernels.sample.noise import gumbel
from euryale.kernels.top_k.reference import top_k


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor, num_valid: int, offset: int
) -> torch.Tensor:
    """See the package's public function."""
    logits, is_greedy = logits[:, :num_valid].float(), (temperature == 0)[:, None]
    noise = gumbel(keys[:, None], torch.arange(num_valid, device=logits.device) + offset)
    scores = logits / torch.where(is_greedy, 1.0, temperature[:, None]) + torch.where(is_greedy, 0.0, noise)
    return top_k(scores, 1, num_valid, offset)
