"""A step plan as tensors: what the model, the sampler and the commit read."""

from dataclasses import dataclass

import numpy as np
import torch

from euryale.kernels.geometry import SegmentShape, StepGeometry
from euryale.scheduler.plan import Segment, StepPlan


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """``tokens`` int64 [R]; ``roots`` int64 [B], each segment's last certain row; ``certain`` int64 [n], all
    certain rows; ``decided`` int64 [N], the rows whose next token is needed (roots and drafts of the sampling
    segments), and ``decided_at`` int64 [R], a row's place among them; ``drafts`` int64 [D], the draft rows, and
    ``parents_at`` int64 [D], the places of their parents among the decided; ``sampling``: which segments sample."""

    segments: list[Segment]
    geometry: StepGeometry
    tokens: torch.Tensor
    roots: torch.Tensor
    certain: torch.Tensor
    decided: torch.Tensor
    decided_at: torch.Tensor
    drafts: torch.Tensor
    parents_at: torch.Tensor
    sampling: list[int]

    @classmethod
    def build(cls, plan: StepPlan, page_size: int, device: torch.device) -> "StepBatch":
        segments = plan.segments
        shapes = [
            SegmentShape(num_certain=s.num_certain, context=s.context, parents=s.parents, pages=s.pages)
            for s in segments
        ]
        geometry = StepGeometry.build(shapes, page_size, device)
        starts = geometry.row_starts
        roots = [starts[i] + s.num_certain - 1 for i, s in enumerate(segments)]
        sampling = [i for i, s in enumerate(segments) if s.samples]
        certain = [row for i, root in enumerate(roots) for row in range(starts[i], root + 1)]
        decided = [row for i in sampling for row in range(roots[i], starts[i + 1])]
        drafts = [row for i in sampling for row in range(roots[i] + 1, starts[i + 1])]
        decided_at = np.full(geometry.num_rows, -1, dtype=np.int64)
        decided_at[decided] = np.arange(len(decided))
        parents = [segments[i].parents + roots[i] for i in sampling]
        parents_at = decided_at[np.concatenate(parents)] if drafts else drafts

        def on_device(x) -> torch.Tensor:
            return torch.from_numpy(np.asarray(x, dtype=np.int64)).to(device)

        return cls(
            segments=segments,
            geometry=geometry,
            tokens=on_device(np.concatenate([s.tokens for s in segments])),
            roots=on_device(roots),
            certain=on_device(certain),
            decided=on_device(decided),
            decided_at=on_device(decided_at),
            drafts=on_device(drafts),
            parents_at=on_device(parents_at),
            sampling=sampling,
        )
