"""Gumbel-max sampling: the largest perturbed logit of every row."""

import torch

from euryale.kernels.backend import implementation


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor, num_valid: int, offset: int
) -> torch.Tensor:
    """The largest of ``logits`` / temperature + Gumbel noise among the first ``num_valid`` columns of each row, and its
    column plus ``offset``, as ``top_k`` gives them: int32 [2, N, 1].

    ``logits`` [N, V]; ``temperature`` float32 [N], at 0 the largest logit itself; ``keys`` int64 [N]. The noise is that
    of noise.py beside this file, a function of the row's key and the token's id alone.
    """
    return implementation("sample", logits.device).sample(logits, temperature, keys, num_valid, offset)
