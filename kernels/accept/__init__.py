"""Finds the accepted path in every draft tree."""

import torch

from euryale.kernels.backend import implementation
from euryale.kernels.step_metadata import StepMetadata


def accept(
    metadata: StepMetadata,
    tokens: torch.Tensor,
    next_tokens: torch.Tensor,
    good: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the deepest path of matching rows of draft tokens in every tree.

    The row of a draft token matches if its token in ``tokens`` int32 [R] equals its parent's entry in ``next_tokens``
    int32 [R]. Where ``good`` int8 [R] is not negative, it decides instead: 1 matches, 0 does not. Of equally deep paths
    the one whose last row has the highest of ``scores`` float32 [R] wins, then the first; None: all scores are equal.

    Returns ``last_rows`` int32 [B], the last row of each path (the root if no draft token is accepted), and
    ``commit_slots`` int64 [R]: the slots of rows of known tokens and of accepted draft tokens, -1 for all other rows.
    """
    return implementation("accept", tokens.device).accept(metadata, tokens, next_tokens, good, scores)
