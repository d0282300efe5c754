"""The walk down every candidate tree: which draft rows are accepted."""

import torch

from euryale.kernels.backend import implementation
from euryale.kernels.geometry import StepGeometry


def accept(
    geometry: StepGeometry, roots: torch.Tensor, fits: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The deepest path of fitting rows of every tree; of equally deep ones the one whose end scores highest,
    then the first.

    ``roots`` int64 [B], each segment's root row; ``fits`` bool [R], whether a draft row may follow its parent
    (certain rows: False); ``scores`` float32 [R]. Returns ``last`` int64 [B], the row where each walk ends (the
    root if nothing is accepted), and ``accepted`` bool [R], the draft rows on the paths.
    """
    return implementation("accept", fits.device).accept(geometry, roots, fits, scores)
