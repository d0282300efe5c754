"""Attention of a step's rows over committed pages and over the step's own rows."""

import torch

from euryale.kernels.backend import implementation
from euryale.kernels.step_metadata import StepMetadata


def tree_attention(
    q: torch.Tensor,
    scratch: torch.Tensor,
    cache: torch.Tensor,
    metadata: StepMetadata,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Computes softmax attention (Medusa paper, section 2.1.2, with the committed context in pages).

    ``q`` [R, heads, head_dim], contiguous within a row. ``scratch`` [2, rows >= R, kv_heads, head_dim]: keys and values
    of this step's rows. ``cache`` [2, pages, kv_heads, page_size, head_dim]. All belong to one layer and are float32 or
    bfloat16. ``scale`` multiplies the scores.

    A row attends to the committed tokens of its request, to the new tokens up to itself, and to its ancestors in the
    tree and itself. ``window`` limits these to the last ``window`` positions, its own included. Returns [R, heads *
    head_dim].
    """
    return implementation("tree_attention", q.device).tree_attention(q, scratch, cache, metadata, scale, window)
