"""Continuous batching: which rows the next step computes, and what its result means for each request.

One rule: computed tokens catch up with known tokens, drafts included. There is no prefill phase and no decode
phase. Everything here happens on rank 0 between steps; this file knows no tensor, no socket and no text.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from euryale.scheduler.pages import PagePool
from euryale.scheduler.plan import Segment, StepPlan
from euryale.scheduler.prefix import PageNames
from euryale.scheduler.request import FinishReason, Request
from euryale.scheduler.tree import TreeShape

_NO_PARENTS = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the model and its memory allow. Tokens, rows (tokens of one step) and pages are counts."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    num_pages: int
    page_size: int
    end_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), or a step could not give every running request a row"
            )


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
    """Owns the requests and the pages. ``tree`` None means no speculation; ``share_prefixes``: requests that begin
    alike use the same pages, and these are kept for later ones while there is room."""

    def __init__(self, limits: Limits, tree: TreeShape | None, share_prefixes: bool = True) -> None:
        self.limits = limits
        self.tree = tree
        self.pages = PagePool(limits.num_pages, limits.page_size)
        self.num_shared = self.num_prompt = 0  # prompt tokens found computed, and all, of admitted requests
        self._names = PageNames(limits.page_size) if share_prefixes else None
        self._coming: set[bytes] = set()  # names of pages that running requests will compute
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.step = 0
        self._planned: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, request: Request) -> None:
        """Raise ValueError, saying how to mend it, if the request could never run."""
        limits, length, wanted = self.limits, len(request.prompt), request.params.max_tokens
        if length == 0:
            raise ValueError("the prompt is empty: give at least one token")
        low, high = int(request.prompt.min()), int(request.prompt.max())
        if low < 0 or high >= limits.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary of {limits.vocab_size}")
        if length + wanted > limits.max_model_len:
            raise ValueError(
                f"{length} prompt tokens and max_tokens {wanted} exceed the model's {limits.max_model_len} tokens: "
                f"shorten the prompt or ask for at most {max(limits.max_model_len - length, 0)}"
            )
        if self.pages.pages_for(length + wanted) > self.pages.num_pages:
            raise ValueError(
                f"{length} prompt tokens and max_tokens {wanted} need {self.pages.pages_for(length + wanted)} KV pages "
                f"and there are {self.pages.num_pages}: ask for less or give the cache more memory"
            )

    def add(self, request: Request) -> None:
        """Queue a request; ValueError as ``check``."""
        self.check(request)
        self.waiting.append(request)

    def cancel(self, key: int) -> Request | None:
        """End the request now and free its pages; None if it is not here (any more). Call between steps."""
        for queue in (self.running, self.waiting):
            for request in queue:
                if request.key == key:
                    request.finish_reason = FinishReason.CANCELLED
                    queue.remove(request)
                    self._release(request)
                    return request
        return None

    def plan(self, epoch: int, digest: int) -> StepPlan:
        """The next step: one row for every decoding request, then drafts and prompt chunks under the row budget."""
        self._admit()
        decoding = [r for r in self.running if r.num_uncomputed == 1]
        prefilling = [r for r in self.running if r.num_uncomputed > 1]
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
                self._publish(request)
                continue
            result = next(found)
            taken = request.append(result.tokens, self.limits.end_ids)
            request.num_computed += len(result.accepted_nodes)
            request.candidates = result.candidates
            request.accepted.append(len(taken))
            self._publish(request)
            outputs.append(Output(request, taken, request.finish_reason))
            if request.finish_reason:
                self.running.remove(request)
                self._release(request)
        self._planned = []
        return outputs

    def _admit(self) -> None:
        """Move waiting requests to running, first come first served: a request that does not fit yet holds back
        those behind it, so that none starves. One whose next page a running request is computing lets others pass."""
        for request in list(self.waiting) if len(self.running) < self.limits.max_num_seqs else ():
            if len(self.running) == self.limits.max_num_seqs:
                return
            usable = self._name_prompt(request)
            shared = self.pages.share(usable)
            if len(shared) < len(usable) and usable[len(shared)] in self._coming:
                self.pages.free(shared)
                continue
            total = self.pages.pages_for(len(request.prompt) + request.params.max_tokens)
            pages = self.pages.allocate(total - len(shared))
            if pages is None:
                self.pages.free(shared)
                return
            request.pages = shared + pages
            request.page_ids = np.asarray(request.pages, dtype=np.int32)
            request.num_computed = request.num_shared = len(shared) * self.pages.page_size
            self.num_shared += request.num_shared
            self.num_prompt += len(request.prompt)
            self._coming.update(usable[len(shared) :])
            self.waiting.remove(request)
            self.running.append(request)

    def _name_prompt(self, request: Request) -> list[bytes]:
        """Names of the prompt's full pages but for the one with its last token, which is computed in any case: what
        follows it is what the request asks for."""
        if self._names is None:
            return []
        if not request.page_names:
            self._names.extend(request.page_names, request.prompt)
        return request.page_names[: (len(request.prompt) - 1) // self.pages.page_size]

    def _publish(self, request: Request) -> None:
        """Make the request's full pages known that are computed by now."""
        if self._names is None:
            return
        names, size = request.page_names, self.pages.page_size
        full = min(request.num_computed, request.num_known) // size  # an answer may end before the accepted path does
        if len(names) < full:
            self._names.extend(names, request.known_tokens(len(names) * size, full * size))
        for place in range(request.num_published, full):
            self.pages.name(request.pages[place], names[place])
            self._coming.discard(names[place])
        request.num_published = full

    def _release(self, request: Request) -> None:
        if request.pages:  # one that still waits may have names in common with whoever computes them
            self._coming.difference_update(request.page_names[request.num_published :])
        self.pages.free(request.pages)
        request.pages = []

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
        if num_drafts == 0:
            return self._segment(request, root, _NO_PARENTS)
        # A guess deeper than the tokens still allowed cannot be used: the bonus token takes the last place.
        shape = self.tree.limited(num_drafts, request.remaining - 1)
        tokens = np.concatenate([root, shape.tokens(request.candidates)])
        return self._segment(request, tokens, shape.parents[1:])

    def _prompt_segment(self, request: Request, rows: int) -> Segment:
        start = request.num_computed
        return self._segment(request, request.known_tokens(start, start + rows), _NO_PARENTS)

    def _segment(self, request: Request, tokens: np.ndarray, parents: np.ndarray) -> Segment:
        num_certain = len(tokens) - len(parents)
        samples = request.num_computed + num_certain == request.num_known
        # Pages past the committed tokens and this step's rows are not sent: nothing reads or writes them yet.
        used = min(self.pages.pages_for(request.num_computed + len(tokens)), len(request.pages))
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
