"""Attention of a step's rows over committed pages and over the step's own rows, chain or tree."""

import torch

from euryale.kernels.backend import implementation
from euryale.kernels.geometry import StepGeometry


def tree_attention(
    q: torch.Tensor,
    scratch: torch.Tensor,
    cache: torch.Tensor,
    geometry: StepGeometry,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention (Medusa paper, section 2.1.2, with the committed context in pages).

    ``q`` [R, heads, head_dim], a row's heads next to each other; ``scratch`` [2, rows >= R, kv_heads, head_dim], keys
    and values of this step's rows; ``cache`` [2, pages, kv_heads, page_size, head_dim], both of this layer. A row sees
    the committed tokens of its request, the rows of known tokens up to itself, and of the draft rows its ancestors and
    itself; with ``window`` only the last ``window`` positions of these, its own included. Returns [R, heads *
    head_dim].
    """
    return implementation("tree_attention", q.device).tree_attention(q, scratch, cache, geometry, scale, window)
