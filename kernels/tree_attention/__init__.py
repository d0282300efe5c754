"""Attention of a step's rows over committed pages and over the step's own rows, chain or tree."""

import torch

from euryale.kernels.geometry import StepGeometry
from euryale.kernels.tree_attention import reference


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: torch.Tensor,
    geometry: StepGeometry,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention (Medusa paper, section 2.1.2, with the committed context in pages).

    ``q`` [R, heads, head_dim]; ``k``, ``v`` [R, kv_heads, head_dim] of this step's rows; ``cache`` [2, pages,
    kv_heads, page_size, head_dim] of this layer. A row sees the committed tokens of its request, the certain rows
    up to itself, and of the draft rows its ancestors and itself; with ``window`` only the last ``window``
    positions of these, its own included. Returns [R, heads, head_dim].
    """
    return reference.tree_attention(q, k, v, cache, geometry, scale, window)
