"""The walk down every candidate tree: which draft rows are accepted."""

import torch

from euryale.kernels.backend import implementation
from euryale.kernels.geometry import StepGeometry


def accept(
    geometry: StepGeometry,
    tokens: torch.Tensor,
    next_tokens: torch.Tensor,
    good: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The deepest path of fitting rows of every tree; of equally deep ones the one whose end scores highest,
    then the first.

    A draft row fits if its token, of ``tokens`` int32 [R], is the one in its parent's place of ``next_tokens`` int32
    [R]; where ``good`` int8 [R] is not negative, it says instead whether the row fits. ``scores`` float32 [R] (None:
    all the same). Returns ``last`` int32 [B], the row where each walk ends (the root if nothing is accepted), and
    ``kept`` int64 [R], the slots of the rows of known tokens and of the drafts on the paths, -1 elsewhere.
    """
    return implementation("accept", tokens.device).accept(geometry, tokens, next_tokens, good, scores)
