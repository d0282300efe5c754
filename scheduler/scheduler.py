"""Continuous batching: plans the rows of each step, and applies its results to the requests.

One rule covers prefill and decoding: computed tokens catch up with known tokens, draft tokens included. Everything here
runs on rank 0 between steps. This file knows no tensor, no socket and no text.
"""

from dataclasses import dataclass

import numpy as np

from euryale.scheduler.admission import STARVATION_BOUND, Admission
from euryale.scheduler.limits import SchedulerLimits
from euryale.scheduler.request import Request
from euryale.scheduler.speculation.draft_budget import BudgetChoice
from euryale.scheduler.speculation.drafter import NO_DRAFT, Drafter, Drafts, DraftTree, RequestStepResult
from euryale.scheduler.step_cost import StepCosts
from euryale.scheduler.step_plan import Segment, StepPlan
from euryale.scheduler.step_result import RequestOutput, SegmentResult

_SAFETY = 0.75  # fraction of a bound on a step's time that is planned for, since step times vary
_NO_DRAFTS = Drafts(trees=[], wants_heads=False)


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step that is about to run; ``Scheduler.advance`` turns it into a FinishedStep.

    ``plan`` is what the ranks execute, ``requests`` those of its segments, ``drafts`` what the drafter proposed.
    ``prefill_seconds``: the predicted time of a step whose prompt rows are bounded by time, else 0.
    """

    plan: StepPlan
    requests: list[Request]
    drafts: Drafts = _NO_DRAFTS
    prefill_seconds: float = 0.0

    @property
    def choice(self) -> BudgetChoice | None:
        """The budget's choice; None if there is no budget."""
        return self.drafts.choice


@dataclass
class FinishedStep:
    """A step that has run: the ``planned`` step, and an output and a result for each request that emitted tokens.

    ``seconds``: its measured time, set by ``Scheduler.observe``; 0 before."""

    planned: PlannedStep
    outputs: list[RequestOutput]
    results: list[RequestStepResult]
    seconds: float = 0.0


class Scheduler:
    """Plans steps for the running requests of ``admission``.

    For each step call ``plan``, ``advance`` and, if it was timed, ``observe``."""

    def __init__(
        self,
        limits: SchedulerLimits,
        drafter: Drafter | None,
        enable_prefix_caching: bool = True,
        starvation_bound: int = STARVATION_BOUND,
        costs: StepCosts | None = None,
        max_prefill_seconds: float = 0.0,
    ) -> None:
        """``drafter``: None turns speculation off. ``enable_prefix_caching``, ``starvation_bound``: see Admission.
        ``max_prefill_seconds``: how long a step that also decodes may take with its prompt rows, predicted by
        ``costs``; 0 means unbounded."""
        self.limits = limits
        self.drafter = drafter
        self.admission = Admission(limits, enable_prefix_caching, starvation_bound)
        self.num_steps = 0
        self._costs, self._max_prefill_seconds = costs, max_prefill_seconds

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.admission.waiting or self.admission.running)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError, with a remedy, if it could never run."""
        self.admission.add(request)

    def cancel(self, key: int) -> Request | None:
        """End the request now, free its pages and return it; None if there is no such request. Call between steps."""
        return self.admission.cancel(key)

    def plan(self, epoch: int, digest: int) -> PlannedStep:
        """Return the next step: a row for every decoding request, draft tokens and prompt chunks, under the row budget.

        ``epoch`` and ``digest`` go into the plan (see StepPlan)."""
        self.admission.begin_step()
        decoding = [r for r in self.admission.running if r.num_uncomputed == 1]
        prefilling = [r for r in self.admission.running if r.num_uncomputed > 1]
        room = self.limits.max_num_batched_tokens - len(decoding)
        before = prefilling[0].num_computed if prefilling else 0
        prompt_rows = self._prompt_rows(len(decoding), sum(r.num_uncomputed for r in prefilling), room, before)
        drafts = self._draft(decoding, room - prompt_rows, prompt_rows, len(prefilling))
        segments = [
            self._segment(request, 1, draft, drafts.wants_heads)
            for request, draft in zip(decoding, drafts.trees, strict=True)
        ]
        # Prompts get the rows that draft tokens leave over, unless the time of their rows is bounded.
        num_draft_tokens, seconds = sum(s.num_draft_tokens for s in segments), 0.0
        if self._costs is None or not self._bounds_prompts(len(decoding)):
            prompt_rows = room - num_draft_tokens
        elif prompt_rows:
            extra = np.array([prompt_rows + num_draft_tokens])
            seconds = float(self._costs.prefilling(len(decoding), extra, before=before)[0])
        requests = decoding
        for request in prefilling:
            if prompt_rows <= 0:
                break
            rows = min(request.num_uncomputed, prompt_rows)
            segments.append(self._segment(request, rows, NO_DRAFT, drafts.wants_heads))
            requests.append(request)
            prompt_rows -= rows
        self.num_steps += 1
        plan = StepPlan(epoch=epoch, step=self.num_steps, digest=digest, segments=segments)
        return PlannedStep(plan=plan, requests=requests, drafts=drafts, prefill_seconds=seconds)

    def advance(self, planned: PlannedStep, results: list[SegmentResult]) -> FinishedStep:
        """Apply the ``results`` of a step and return each request's new tokens and step result.

        ``results``: one for each segment with ``has_result``, in order."""
        outputs, request_results, in_order = [], [], iter(results)
        for request, segment in zip(planned.requests, planned.plan.segments, strict=True):
            request.num_computed += segment.num_new_tokens
            result = next(in_order) if segment.has_result else None
            if result is not None and result.prompt_logprobs is not None:
                request.prompt_logprobs.append(result.prompt_logprobs)
            if result is None or not segment.emits_tokens:
                self.admission.settle(request)
                continue
            taken = request.append(result.tokens, self.limits.end_ids)
            request.num_computed += len(result.accepted_nodes)
            before, request.head_candidates = request.head_candidates, result.head_candidates
            request.tokens_per_step.append(len(taken))
            self.admission.settle(request)
            outputs.append(request.output_of(taken, result.logprobs))
            request_results.append(
                RequestStepResult(request, result.tokens, result.accepted_nodes, segment.num_draft_tokens, before)
            )
            if request.finish_reason:
                self.admission.end(request)
        if self.drafter:
            self.drafter.learn(planned.drafts, request_results)
        return FinishedStep(planned, outputs, request_results)

    def observe(self, finished: FinishedStep, seconds: float) -> None:
        """Learn from the measured ``seconds`` of a step, planning and ``advance`` included."""
        finished.seconds, planned = seconds, finished.planned
        if self.drafter:
            self.drafter.observe(planned.drafts, finished.results, seconds)
        if self._costs and planned.prefill_seconds:
            self._costs.learn_prompts(planned.prefill_seconds, seconds)

    def _bounds_prompts(self, num_decoding: int) -> bool:
        """Return whether the time of prompt rows is bounded in a step with so many decoding requests."""
        return bool(num_decoding and self._costs and self._max_prefill_seconds)

    def _prompt_rows(self, num_decoding: int, wanted: int, room: int, before: int) -> int:
        """Return how many rows are reserved for prompts before draft tokens are chosen.

        That is half of the row budget, so that trees cannot starve prompts. If the time of prompt rows is bounded, it
        is what the bound allows, but at least one page. ``wanted``: uncomputed prompt tokens; ``room``: free rows;
        ``before``: tokens computed before the first chunk."""
        rows = min(wanted, self.limits.max_num_batched_tokens // 2, room)
        if not wanted or self._costs is None or not self._bounds_prompts(num_decoding):
            return rows
        rows = min(wanted, room)
        sizes = np.arange(rows + 1)
        fits = self._costs.prefilling(num_decoding, sizes, before=before) <= _SAFETY * self._max_prefill_seconds
        return min(rows, max(int(sizes[fits][-1]) if fits.any() else 0, self.limits.page_size))

    def _draft(self, decoding: list[Request], room: int, num_prompt_rows: int, num_prefilling: int) -> Drafts:
        """Return the drafter's proposal for at most ``room`` rows, with pages held for it."""
        if self.drafter is None:
            return Drafts(trees=[NO_DRAFT] * len(decoding), wants_heads=False)
        depth = self.drafter.depth

        def max_depths() -> list[int]:
            # The bonus token takes the last of the output tokens still allowed. Draft tokens also need room in pages.
            return [
                min(depth, r.num_remaining - 1, pages) if r.params.speculation else 0
                for r, pages in zip(decoding, self.admission.room_for_drafts(decoding), strict=True)
            ]

        drafts = self.drafter.draft(decoding, max_depths, room, num_prompt_rows, num_prefilling)
        for request, tree in zip(decoding, drafts.trees, strict=True):
            if tree.depth:
                self.admission.hold_for_drafts(request, tree.depth)
        return drafts

    def _segment(self, request: Request, num_new_tokens: int, draft: DraftTree, wants_heads: bool) -> Segment:
        """Return the segment with the next ``num_new_tokens`` known tokens and the draft tokens below the last one."""
        context = request.num_computed
        tokens = draft.tokens if draft.depth else request.known_tokens(context, context + num_new_tokens)
        emits_tokens = context + num_new_tokens == request.num_known
        # Only pages for the committed tokens and for this step's rows are sent: nothing uses later ones.
        used = min(self.admission.pages.pages_for(context + len(tokens)), len(request.pages))
        return Segment(
            tokens=tokens,
            parents=draft.parents,
            pages=request.page_ids[:used],
            context=context,
            emits_tokens=emits_tokens,
            wants_head_candidates=wants_heads and emits_tokens and request.params.speculation,
            output_index=len(request.output),
            params=request.params,
            sample_index=request.sample_index,
            logits_inputs=None
            if request.params.is_bare
            else request.logits_inputs(num_new_tokens, emits_tokens, self.limits.end_ids),
        )
