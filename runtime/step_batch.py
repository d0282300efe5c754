"""A step plan as tensors: what the model, the sampler and the commit read."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from euryale.kernels.geometry import SegmentShape, StepGeometry, geometry_arrays
from euryale.kernels.tables import Tables
from euryale.runtime.sampling.sampler import RowParams, row_arrays
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_plan import Segment, StepPlan

_NONE = np.zeros(0, dtype=np.int32)
_GREEDY = SamplingParams()


@dataclass(frozen=True)
class StepKind:
    """What a plan asks for. ``is_decode``: every segment samples and has one row of a known token, so that every row is
    decided. ``is_sampled``: some request draws; ``is_filtered``: one that draws leaves out some tokens or accepts by
    the typical rule; ``has_logits_inputs``: some request changes logits or wants to be told of them.
    ``wants_head_candidates``: some request guesses on."""

    is_decode: bool
    is_sampled: bool
    is_filtered: bool
    has_logits_inputs: bool
    wants_head_candidates: bool

    @property
    def is_plain(self) -> bool:
        """Whether none wants more than exact acceptance without filters, of the logits as they are."""
        return not self.is_filtered and not self.has_logits_inputs

    @classmethod
    def of(cls, plan: StepPlan) -> "StepKind":
        drawing = [s.params for s in plan.segments if s.emits_tokens and s.params.temperature > 0]
        return cls(
            is_decode=all(s.emits_tokens and s.num_new_tokens == 1 for s in plan.segments),
            is_sampled=bool(drawing),
            is_filtered=any(p.is_filtered or p.acceptance == "typical" for p in drawing),
            has_logits_inputs=any(s.logits_inputs is not None for s in plan.segments),
            wants_head_candidates=any(s.wants_head_candidates for s in plan.segments),
        )


def padding(sizes: tuple[int, int], padded: tuple[int, int]) -> list[int]:
    """Rows of each request that fills a step of so many rows and requests up: the last takes what is left."""
    rows, requests = (wanted - have for wanted, have in zip(padded, sizes, strict=True))
    return [1] * (requests - 1) + [rows - (requests - 1)] if requests else []


class StepBatch:
    """``tokens`` int32 [R]; ``decided`` int64 [N], the rows whose next token is needed (roots and drafts of the
    sampling segments), None if these are all rows; ``decided_at`` int64 [R], a row's place among them, -1 for others;
    ``wanted`` int64 [W], the segments that guess on, None if these are all; ``rules``: the decided rows' parameters,
    None if no request draws. ``host_tokens``, ``host_parents`` (of geometry) and ``host_decided_at`` are the host's.

    Padding, rows and segments that nobody reads, comes behind the plan's own.
    """

    def __init__(
        self,
        plan: StepPlan,
        page_size: int,
        device: torch.device,
        padded: tuple[int, int] | None = None,
        pages: int = 0,
    ) -> None:
        """``padded``: rows and segments with padding; ``pages``: room for so many page ids. Both are for batches that
        are filled again."""
        self.kind, self._page_size, self._padded = StepKind.of(plan), page_size, padded
        arrays = self._take(plan)
        self._tables = Tables(arrays, device, {"pages": pages} if pages else None)
        tensors = self._tables.tensors
        self.geometry = StepGeometry.of(self._shapes, page_size, arrays, tensors, is_refilled=padded is not None)
        self.tokens, self.decided = tensors["tokens"], tensors.get("decided")
        self.decided_at, self.wanted = tensors.get("decided_at"), tensors.get("wanted")
        self.rules = None
        if self.kind.is_sampled:
            columns = {name: tensors[name] for name in RowParams.ARRAYS}
            self.rules = RowParams(is_plain=not self.kind.is_filtered, **columns)

    def refill(self, plan: StepPlan) -> bool:
        """Take another plan of the same kind, rows and segments, in the same memory; False if it does not fit."""
        arrays = self._take(plan)
        self._tables.fill(arrays)
        return self.geometry.refill(self._shapes, arrays)

    @cached_property
    def sampling(self) -> list[int]:
        """Which segments sample."""
        return [i for i, segment in enumerate(self.segments) if segment.emits_tokens]

    def decided_rows(self, segment: int) -> slice:
        """Where the tree of a sampling segment, root first, lies among the decided rows."""
        start, stop = self.geometry.row_starts[segment : segment + 2]
        start += self.segments[segment].num_new_tokens - 1
        first = start if self.host_decided_at is None else int(self.host_decided_at[start])
        return slice(first, first + stop - start)

    def _take(self, plan: StepPlan) -> dict[str, np.ndarray]:
        self.segments: list[Segment] = plan.segments
        self.__dict__.pop("sampling", None)
        self._shapes = [
            SegmentShape(num_new_tokens=s.num_new_tokens, context=s.context, parents=s.parents, pages=s.pages)
            for s in plan.segments
        ]
        tokens = [s.tokens for s in plan.segments]
        if self._padded is not None:
            self._pad(tokens, padding((plan.num_rows, len(plan.segments)), self._padded))
        arrays = geometry_arrays(self._shapes, self._page_size)
        arrays["tokens"] = np.concatenate(tokens).astype(np.int32, copy=False)
        self.host_parents, self.host_tokens = arrays["parent_rows"], arrays["tokens"]
        self.host_decided_at = None
        if not self.kind.is_decode:
            self._decide(arrays)
        if self.kind.is_sampled:
            self._sample(arrays)
        return arrays

    def _pad(self, tokens: list[np.ndarray], counts: list[int]) -> None:
        for count in counts:
            self._shapes.append(SegmentShape(num_new_tokens=count, context=0, parents=_NONE, pages=_NONE))
            tokens.append(np.zeros(count, dtype=np.int32))

    def _decide(self, arrays: dict[str, np.ndarray]) -> None:
        """Which rows' next tokens are needed."""
        of_row = arrays["segment_of_row"]
        roots = arrays["starts"][:-1] + arrays["num_new_tokens"] - 1
        samples = np.asarray([s.emits_tokens for s in self.segments])
        is_decided = samples[of_row] & (np.arange(len(of_row)) >= roots[of_row])
        arrays["decided"] = is_decided.nonzero()[0]
        arrays["wanted"] = np.asarray(
            [i for i, s in enumerate(self.segments) if s.wants_head_candidates], dtype=np.int64
        )
        self.host_decided_at = arrays["decided_at"] = np.where(is_decided, is_decided.cumsum() - 1, -1)

    def _sample(self, arrays: dict[str, np.ndarray]) -> None:
        """Parameters of every decided row; padding is greedy."""
        rows, starts, depths = [], arrays["starts"], arrays["depths"]
        for i in self.sampling:
            segment = self.segments[i]
            for row in range(starts[i] + segment.num_new_tokens - 1, starts[i + 1]):
                rows.append((segment.params, segment.sample_index, segment.output_index + int(depths[row])))
        if self.kind.is_decode:
            rows += [(_GREEDY, 0, 0)] * (len(depths) - len(rows))
        arrays |= row_arrays(rows)
