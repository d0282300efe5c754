"""Continuous batching: which rows the next step computes, and what its result means for each request.

One rule: computed tokens catch up with known tokens, drafts included. There is no prefill phase and no decode
phase. Everything here happens on rank 0 between steps; this file knows no tensor, no socket and no text.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from euryale.client.logprobs import Logprobs
from euryale.scheduler.admission import STARVATION_BOUND, Admission, SchedulerLimits
from euryale.scheduler.request import FinishReason, HeadCandidates, Request
from euryale.scheduler.speculation.draft_budget import BudgetChoice
from euryale.scheduler.speculation.drafter import NO_DRAFT, Draft, Drafter, RequestStepResult
from euryale.scheduler.step_cost import StepCosts
from euryale.scheduler.step_plan import Segment, StepPlan

_CAREFUL = 0.75  # of a bound on a step's time is planned with, as steps differ


@dataclass(slots=True, kw_only=True)
class SegmentResult:
    """What a step found for one segment. ``tokens``: accepted drafts, then the bonus token. ``accepted_nodes``: their
    tree nodes in order of depth. ``guesses``: None if the heads were not asked. ``logprobs``: of the tokens;
    ``prompt_logprobs``: of the prompt's tokens that this step scored; each None if it was not asked for."""

    tokens: list[int]
    accepted_nodes: list[int]
    head_candidates: HeadCandidates | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None


class Output(NamedTuple):
    """New tokens of one request; ``finish_reason`` is None while it goes on. If asked for, ``logprobs`` of the tokens
    and, with the first of them, ``prompt_logprobs``."""

    request: Request
    tokens: list[int]
    finish_reason: FinishReason | None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None


class Scheduler:
    """Plans the steps of the requests that ``admission`` lets run. ``drafter`` None means no speculation."""

    def __init__(
        self,
        limits: SchedulerLimits,
        drafter: Drafter | None,
        enable_prefix_caching: bool = True,
        starvation_bound: int = STARVATION_BOUND,
        costs: StepCosts | None = None,
        longest_step: float = 0.0,
    ) -> None:
        """``longest_step``: seconds that steps of running streams may take because of prompts (0: any), by ``costs``;
        the rest is as in ``Admission``."""
        self.limits = limits
        self.drafter = drafter
        self.admission = Admission(limits, enable_prefix_caching, starvation_bound)
        self.step = 0
        self.num_first_head_candidates = self.num_first_head_correct = 0  # of the first head's likeliest token
        self.step_results: list[RequestStepResult] = []  # what the last step found
        self._costs, self._longest_step = costs, longest_step
        self._predicted = 0.0  # seconds of a step with rows of prompts that streams wait for
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
        """The next step: one row for every decoding request, prompt chunks, and guesses under the row budget."""
        self.admission.begin_step()
        decoding = [r for r in self.admission.running if r.num_uncomputed == 1]
        prefilling = [r for r in self.admission.running if r.num_uncomputed > 1]
        room = self.limits.max_num_batched_tokens - len(decoding)
        before = prefilling[0].num_computed if prefilling else 0
        prompt_rows = self._prompt_rows(len(decoding), sum(r.num_uncomputed for r in prefilling), room, before)
        segments = self._decode_segments(decoding, room - prompt_rows, prompt_rows)
        self._planned = decoding
        # Rows that no guess takes are the prompts', unless running streams would wait too long for them.
        if not self._bounds_prompts(len(decoding)):
            prompt_rows = room - sum(s.num_draft_tokens for s in segments)
        if self._bounds_prompts(len(decoding)) and prompt_rows:
            extra = np.array([prompt_rows + sum(s.num_draft_tokens for s in segments)])
            self._predicted = float(self._costs.prefilling(len(decoding), extra, before=before)[0])
        for request in prefilling:
            if prompt_rows <= 0:
                break
            rows = min(request.num_uncomputed, prompt_rows)
            segments.append(self._segment(request, rows, NO_DRAFT, self._wants_heads))
            self._planned.append(request)
            prompt_rows -= rows
        self.step += 1
        return StepPlan(epoch=epoch, step=self.step, digest=digest, segments=segments)

    def advance(self, plan: StepPlan, results: list[SegmentResult], seconds: float = 0.0) -> list[Output]:
        """Apply the results of the plan's segments that have one, in order; returns what each request gained.
        ``seconds``: how long the step took, 0 if nobody measured."""
        outputs, step_results, found = [], [], iter(results)
        for request, segment in zip(self._planned, plan.segments, strict=True):
            request.num_computed += segment.num_new_tokens
            result = next(found) if segment.has_result else None
            if result is not None and result.prompt_logprobs is not None:
                request.prompt_logprobs += result.prompt_logprobs
            if not segment.emits_tokens:
                self.admission.settle(request)
                continue
            taken = request.append(result.tokens, self.limits.end_ids)
            request.num_computed += len(result.accepted_nodes)
            named = request.head_candidates
            if named is not None:
                self.num_first_head_candidates += 1
                self.num_first_head_correct += result.tokens[0] == named.ids[0, 0]
            request.head_candidates = result.head_candidates
            request.tokens_per_step.append(len(taken))
            self.admission.settle(request)
            outputs.append(Output(request, taken, request.finish_reason, *request.logprobs_of(result.logprobs, taken)))
            step_results.append(
                RequestStepResult(request, result.tokens, result.accepted_nodes, segment.num_draft_tokens, named)
            )
            if request.finish_reason:
                self.admission.end(request)
        if self.drafter:
            self.drafter.learn(step_results, seconds)
        if self._predicted and seconds:
            self._costs.learn_prompts(self._predicted, seconds)
        self._predicted = 0.0
        self.step_results, self._planned = step_results, []
        return outputs

    @property
    def choice(self) -> BudgetChoice | None:
        """What was chosen for the last step; None if nothing is chosen."""
        return self.drafter.choice if self.drafter else None

    @property
    def _wants_heads(self) -> bool:
        return self.drafter is not None and self.drafter.wants_heads()

    def _bounds_prompts(self, num_decoding: int) -> bool:
        return bool(num_decoding and self._costs and self._longest_step)

    def _prompt_rows(self, num_decoding: int, wanted: int, room: int, before: int) -> int:
        """Rows that guesses leave to prompts: half of all, so that trees cannot starve prompts, as long as running
        streams do not wait too long for it; a page's worth in any case."""
        rows = min(wanted, self.limits.max_num_batched_tokens // 2, room)
        if not wanted or not self._bounds_prompts(num_decoding):
            return rows
        rows = min(wanted, room)
        sizes = np.arange(rows + 1)
        fits = self._costs.prefilling(num_decoding, sizes, before=before) <= _CAREFUL * self._longest_step
        return min(rows, max(int(sizes[fits][-1]) if fits.any() else 0, self.limits.page_size))

    def _decode_segments(self, decoding: list[Request], room: int, num_prompt_rows: int) -> list[Segment]:
        drafts = [NO_DRAFT] * len(decoding)
        if self.drafter:
            # A guess deeper than the tokens still allowed cannot be used: the bonus token takes the last place. Nor can
            # one that no page can be had for.
            depths = [
                min(self.drafter.depth, r.remaining - 1, pages) if r.params.speculation else 0
                for r, pages in zip(decoding, self.admission.room_for_drafts(decoding), strict=True)
            ]
            drafts = self.drafter.draft(decoding, depths, room, num_prompt_rows)
            for request, draft in zip(decoding, drafts, strict=True):
                self.admission.hold_for_drafts(request, draft.depth)
        wants = self._wants_heads
        return [self._segment(request, 1, draft, wants) for request, draft in zip(decoding, drafts, strict=True)]

    def _segment(self, request: Request, num_new_tokens: int, draft: Draft, wants_heads: bool) -> Segment:
        """The next ``num_new_tokens`` known tokens, the last of which is the draft's root if there is one."""
        context = request.num_computed
        tokens = draft.tokens if draft.depth else request.known_tokens(context, context + num_new_tokens)
        emits_tokens = context + num_new_tokens == request.num_known
        # Pages past the committed tokens and this step's rows are not sent: nothing reads or writes them yet.
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
