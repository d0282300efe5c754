"""Gumbel-max sampling: the largest perturbed logit of every row."""

import torch

from euryale.kernels.backend import implementation


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor, num_valid: int, offset: int
) -> torch.Tensor:
    """Finds each row's largest value of logit / temperature + Gumbel noise among its first ``num_valid`` columns.

    ``logits`` [N, V] float32 or bfloat16. ``temperature`` float32 [N]; 0 takes the largest logit, without noise.
    ``keys`` int64 [N]: the noise (noise.py beside this file) depends only on a row's key and a token's id, which is its
    column plus ``offset``. Returns values and token ids packed as by ``top_k``: int32 [2, N, 1].
    """
    return implementation("sample", logits.device).sample(logits, temperature, keys, num_valid, offset)
