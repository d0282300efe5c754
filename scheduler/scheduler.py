"""Continuous batching: which rows the next step computes, and what its result means for each request.

One rule: computed tokens catch up with known tokens, drafts included. There is no prefill phase and no decode
phase. Everything here happens on rank 0 between steps; this file knows no tensor, no socket and no text.
"""

from dataclasses import dataclass

import numpy as np

from euryale.scheduler.admission import STARVATION_BOUND, Admission, Limits
from euryale.scheduler.plan import Segment, StepPlan
from euryale.scheduler.request import FinishReason, Request
from euryale.scheduler.tree import TreeShape

_NO_PARENTS = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class SegmentResult:
    """What a step found for one sampling segment. ``tokens``: accepted drafts, then the bonus token.
    ``accepted_nodes``: their tree nodes in order of depth. ``candidates``: int32 [heads, k] or None."""

    tokens: list[int]
    accepted_nodes: list[int]
    candidates: np.ndarray | None


@dataclass(frozen=True)
class Output:
    """New tokens of one request; ``finish_reason`` is None while it goes on."""

    request: Request
    tokens: list[int]
    finish_reason: FinishReason | None


class Scheduler:
    """Plans the steps of the requests that ``admission`` lets run. ``tree`` None means no speculation; the rest is as
    in ``Admission``."""

    def __init__(
        self,
        limits: Limits,
        tree: TreeShape | None,
        share_prefixes: bool = True,
        starvation_bound: int = STARVATION_BOUND,
    ) -> None:
        self.limits = limits
        self.tree = tree
        self.admission = Admission(limits, share_prefixes, starvation_bound)
        self.step = 0
        self._planned: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.admission.waiting or self.admission.running)

    def add(self, request: Request) -> None:
        """Queue a request; ValueError, saying how to mend it, if it could never run."""
        self.admission.add(request)

    def cancel(self, key: int) -> Request | None:
        """End the request now and free its pages; None if it is not here (any more). Call between steps."""
        return self.admission.cancel(key)

    def plan(self, epoch: int, digest: int) -> StepPlan:
        """The next step: one row for every decoding request, then drafts and prompt chunks under the row budget."""
        self.admission.begin_step()
        decoding = [r for r in self.admission.running if r.num_uncomputed == 1]
        prefilling = [r for r in self.admission.running if r.num_uncomputed > 1]
        budget = self.limits.max_num_batched_tokens - len(decoding)
        # Trees may not starve prompts: while prompts wait for rows, half of the rows are theirs.
        prompt_rows = min(sum(r.num_uncomputed for r in prefilling), self.limits.max_num_batched_tokens // 2, budget)
        drafts = self._share_drafts(decoding, budget - prompt_rows)
        segments = [self._decode_segment(r, n) for r, n in zip(decoding, drafts, strict=True)]
        self._planned = decoding
        budget -= sum(drafts)
        for request in prefilling:
            if budget <= 0:
                break
            rows = min(request.num_uncomputed, budget)
            segments.append(self._prompt_segment(request, rows))
            self._planned.append(request)
            budget -= rows
        self.step += 1
        return StepPlan(epoch=epoch, step=self.step, digest=digest, segments=segments)

    def advance(self, plan: StepPlan, results: list[SegmentResult]) -> list[Output]:
        """Apply the results of the plan's sampling segments, in order; returns what each request gained."""
        outputs, found = [], iter(results)
        for request, segment in zip(self._planned, plan.segments, strict=True):
            request.num_computed += segment.num_certain
            if not segment.samples:
                self.admission.settle(request)
                continue
            result = next(found)
            taken = request.append(result.tokens, self.limits.end_ids)
            request.num_computed += len(result.accepted_nodes)
            request.candidates = result.candidates
            request.accepted.append(len(taken))
            self.admission.settle(request)
            outputs.append(Output(request, taken, request.finish_reason))
            if request.finish_reason:
                self.admission.end(request)
        self._planned = []
        return outputs

    def _share_drafts(self, decoding: list[Request], budget: int) -> list[int]:
        """How many draft rows each decoding request gets: equal shares, the first requests one more."""
        drafting = [r for r in decoding if r.candidates is not None and r.remaining > 1]
        if self.tree is None or not drafting:
            return [0] * len(decoding)
        share, extra = divmod(max(budget, 0), len(drafting))
        allowed = {r.key: min(self.tree.num_drafts, share + (i < extra)) for i, r in enumerate(drafting)}
        return [allowed.get(r.key, 0) for r in decoding]

    def _decode_segment(self, request: Request, num_drafts: int) -> Segment:
        root = request.known_tokens(request.num_computed, request.num_known)
        # A guess deeper than the tokens still allowed cannot be used: the bonus token takes the last place.
        depth = min(self.tree.depth, num_drafts, request.remaining - 1) if num_drafts else 0
        if depth:  # nor one that no page can be had for
            depth = self.admission.room_for_drafts(request, depth)
        if not depth:
            return self._segment(request, root, _NO_PARENTS)
        shape = self.tree.limited(num_drafts, depth)
        tokens = np.concatenate([root, shape.tokens(request.candidates)])
        return self._segment(request, tokens, shape.parents[1:])

    def _prompt_segment(self, request: Request, rows: int) -> Segment:
        start = request.num_computed
        return self._segment(request, request.known_tokens(start, start + rows), _NO_PARENTS)

    def _segment(self, request: Request, tokens: np.ndarray, parents: np.ndarray) -> Segment:
        num_certain = len(tokens) - len(parents)
        samples = request.num_computed + num_certain == request.num_known
        # Pages past the committed tokens and this step's rows are not sent: nothing reads or writes them yet.
        used = min(self.admission.pages.pages_for(request.num_computed + len(tokens)), len(request.pages))
        return Segment(
            tokens=tokens,
            parents=parents,
            pages=request.page_ids[:used],
            context=request.num_computed,
            samples=samples,
            wants_candidates=samples and self.tree is not None and request.params.speculation,
            position=len(request.output),
            params=request.params,
        )
