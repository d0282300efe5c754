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
        parents, of_row = geometry.parent_rows.cpu().numpy(), geometry.segment_of_row.cpu().numpy()
        num_certain = np.asarray([s.num_certain for s in segments])
        roots = np.asarray(geometry.row_starts[:-1]) + num_certain - 1
        samples = np.asarray([s.samples for s in segments])
        is_decided = samples[of_row] & (np.arange(len(parents)) >= roots[of_row])
        (decided,), (certain,), (drafts,) = is_decided.nonzero(), (parents < 0).nonzero(), (parents >= 0).nonzero()
        decided_at = np.where(is_decided, is_decided.cumsum() - 1, -1)
        host = {
            "tokens": np.concatenate([s.tokens for s in segments]).astype(np.int64),
            "roots": roots,
            "certain": certain,
            "decided": decided,
            "decided_at": decided_at,
            "drafts": drafts,
            "parents_at": decided_at[parents[drafts]],
        }
        on_device = {name: torch.from_numpy(array).to(device) for name, array in host.items()}
        return cls(segments=segments, geometry=geometry, sampling=samples.nonzero()[0].tolist(), **on_device)
