"""Turns a step plan into the tensors that the model, the sampler and the commit read.

``StepArrays.of`` derives all arrays from a plan in one pass, on the host. A frozen ``StepBatch`` adds the tensors that
hold these arrays on the device. ``StepMemory`` keeps the tensors of recorded steps, which later steps refill.

Legend: R rows, N decided rows, B segments, W segments that want head candidates.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from euryale.kernels.step_metadata import SegmentShape, StepMetadata, metadata_arrays
from euryale.kernels.tables import Tables
from euryale.runtime.sampling.sampler import RowParams, row_arrays
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_plan import Segment, StepPlan

_NONE = np.zeros(0, dtype=np.int32)
_GREEDY = SamplingParams()


@dataclass(frozen=True)
class StepKind:
    """Features that a plan needs.

    ``is_decode``: every segment emits tokens and has one new token, so every row is decided. ``is_sampled``: some
    request has a temperature above 0. ``is_filtered``: one of these uses top-k, top-p, min-p or typical acceptance.
    ``has_logits_inputs``: some request changes logits or wants log-probabilities. ``wants_head_candidates``: some
    request continues to speculate.
    """

    is_decode: bool
    is_sampled: bool
    is_filtered: bool
    has_logits_inputs: bool
    wants_head_candidates: bool

    @property
    def is_plain(self) -> bool:
        """Whether all requests use exact acceptance, no filters and unchanged logits."""
        return not self.is_filtered and not self.has_logits_inputs

    @classmethod
    def of(cls, plan: StepPlan) -> "StepKind":
        """Return the kind of a plan."""
        drawing = [s.params for s in plan.segments if s.emits_tokens and s.params.temperature > 0]
        return cls(
            is_decode=all(s.emits_tokens and s.num_new_tokens == 1 for s in plan.segments),
            is_sampled=bool(drawing),
            is_filtered=any(p.is_filtered or p.acceptance == "typical" for p in drawing),
            has_logits_inputs=any(s.logits_inputs is not None for s in plan.segments),
            wants_head_candidates=any(s.wants_head_candidates for s in plan.segments),
        )


def padding(sizes: tuple[int, int], padded: tuple[int, int]) -> list[int]:
    """Return the rows of each padding request. The last one takes the remaining rows.

    ``sizes``: rows and requests of a step; ``padded``: the same with padding.
    """
    rows, requests = (wanted - have for wanted, have in zip(padded, sizes, strict=True))
    return [1] * (requests - 1) + [rows - (requests - 1)] if requests else []


@dataclass(frozen=True, kw_only=True)
class StepArrays:
    """A plan on the host.

    ``shapes``: shapes of the segments, then of the padding. ``arrays``: contents of the tensors by name.
    ``emitting``: indices of the segments that emit tokens. ``decided_at`` int64 [R]: each row's index among the decided
    rows, -1 for others; None if all rows are decided.
    """

    kind: StepKind
    segments: list[Segment]
    shapes: list[SegmentShape]
    arrays: dict[str, np.ndarray]
    emitting: list[int]
    decided_at: np.ndarray | None

    @classmethod
    def of(cls, plan: StepPlan, page_size: int, padded: tuple[int, int] | None = None) -> "StepArrays":
        """Derive all arrays from ``plan``. ``padded``: rows and segments including padding, None for no padding."""
        kind, segments = StepKind.of(plan), plan.segments
        counts = padding((plan.num_rows, len(segments)), padded) if padded is not None else []
        shapes = [
            SegmentShape(num_new_tokens=s.num_new_tokens, context=s.context, parents=s.parents, pages=s.pages)
            for s in segments
        ]
        shapes += [SegmentShape(num_new_tokens=count, context=0, parents=_NONE, pages=_NONE) for count in counts]
        arrays = metadata_arrays(shapes, page_size)
        tokens = [s.tokens for s in segments] + [np.zeros(count, dtype=np.int32) for count in counts]
        arrays["tokens"] = np.concatenate(tokens).astype(np.int32, copy=False)
        emitting = [i for i, segment in enumerate(segments) if segment.emits_tokens]
        if not kind.is_decode:
            arrays |= _decided(segments, arrays)
        if kind.is_sampled:
            arrays |= row_arrays(_sampling_rows(segments, emitting, arrays, is_padded=kind.is_decode))
        decided_at = arrays.get("decided_at")
        return cls(kind=kind, segments=segments, shapes=shapes, arrays=arrays, emitting=emitting, decided_at=decided_at)

    def decided_rows(self, segment: int) -> slice:
        """Return the decided rows of a segment that emits tokens: its tree, root first."""
        start, stop = self.arrays["starts"][segment : segment + 2].tolist()
        start += self.segments[segment].num_new_tokens - 1
        first = start if self.decided_at is None else int(self.decided_at[start])
        return slice(first, first + stop - start)


def _decided(segments: list[Segment], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays ``decided``, ``decided_at`` and ``wanted`` of a StepBatch."""
    of_row = arrays["segment_of_row"]
    roots = arrays["starts"][:-1] + arrays["num_new_tokens"] - 1
    emits = np.asarray([s.emits_tokens for s in segments])
    is_decided = emits[of_row] & (np.arange(len(of_row)) >= roots[of_row])
    return {
        "decided": is_decided.nonzero()[0],
        "decided_at": np.where(is_decided, is_decided.cumsum() - 1, -1),
        "wanted": np.asarray([i for i, s in enumerate(segments) if s.wants_head_candidates], dtype=np.int64),
    }


def _sampling_rows(
    segments: list[Segment], emitting: list[int], arrays: dict[str, np.ndarray], is_padded: bool
) -> list[tuple[SamplingParams, int, int]]:
    """Return parameters, sample index and output index of every decided row; padding is greedy."""
    rows: list[tuple[SamplingParams, int, int]] = []
    starts, depths = arrays["starts"], arrays["depths"]
    for i in emitting:
        segment = segments[i]
        for row in range(starts[i] + segment.num_new_tokens - 1, starts[i + 1]):
            rows.append((segment.params, segment.sample_index, segment.output_index + int(depths[row])))
    return rows + [(_GREEDY, 0, 0)] * (len(depths) - len(rows)) if is_padded else rows


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """A step on the device and on the ``host``.

    ``tokens`` int32 [R]. ``decided`` int64 [N]: rows whose next token is needed, which are the roots and draft tokens
    of the segments that emit tokens; None if these are all rows. ``decided_at`` int64 [R]: each row's index among the
    decided rows, -1 for others; None like ``decided``. ``wanted`` int64 [W]: segments that want head candidates; None
    if all do. ``rules``: sampling parameters of the decided rows; None if all requests are greedy. Rows and segments of
    padding follow those of the plan.
    """

    host: StepArrays
    metadata: StepMetadata
    tokens: torch.Tensor
    decided: torch.Tensor | None
    decided_at: torch.Tensor | None
    wanted: torch.Tensor | None
    rules: RowParams | None

    @classmethod
    def of(cls, plan: StepPlan, page_size: int, device: torch.device) -> "StepBatch":
        """Return the batch of a plan in newly allocated memory."""
        return StepMemory(StepArrays.of(plan, page_size), page_size, device).batch


class StepMemory:
    """Tensors for consecutive steps of one kind with the same numbers of rows and segments."""

    def __init__(self, host: StepArrays, page_size: int, device: torch.device, num_pages: int = 0) -> None:
        """Allocate tensors for ``host``. ``num_pages``: room for page ids in later steps, 0 if never refilled."""
        self._tables = Tables(host.arrays, device, {"pages": num_pages} if num_pages else None)
        tensors = self._tables.tensors
        metadata = StepMetadata.of(host.shapes, page_size, host.arrays, tensors, is_refilled=num_pages > 0)
        rules = None
        if host.kind.is_sampled:
            columns = {name: tensors[name] for name in RowParams.ARRAYS}
            rules = RowParams(is_plain=not host.kind.is_filtered, **columns)
        self.batch = StepBatch(
            host=host,
            metadata=metadata,
            tokens=tensors["tokens"],
            decided=tensors.get("decided"),
            decided_at=tensors.get("decided_at"),
            wanted=tensors.get("wanted"),
            rules=rules,
        )

    def fill(self, host: StepArrays) -> StepBatch | None:
        """Refill the tensors with another step and return its batch; None if it does not fit.

        The previous batch becomes invalid in both cases.
        """
        self._tables.fill(host.arrays)
        if not self.batch.metadata.refill(host.shapes, host.arrays):
            return None
        self.batch = replace(self.batch, host=host)
        return self.batch
