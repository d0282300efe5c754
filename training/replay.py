"""Recorded answers decoded again with dynamic trees, without a model: the tokens are known, and so is what the heads
would say at each of them. What the trees learn on the way is what serving begins with.

Shape suffixes: P positions, K heads, R ranks.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from euryale.scheduler.request import FinishReason, Request
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.speculation.drafter import NO_DRAFT, Drafter, Drafts, RequestStepResult
from euryale.scheduler.step_result import HeadCandidates


@dataclass(frozen=True)
class Recorded:
    """``prompt`` and ``answer`` int32; ``ids_PKR`` int32 and ``logits_PKR`` float32: what the heads say at the prompt's
    last token, then at each token of the answer but for the last."""

    prompt: np.ndarray
    answer: np.ndarray
    ids_PKR: np.ndarray
    logits_PKR: np.ndarray


_KEYS = itertools.count()


def replay(drafter: Drafter, recorded: list[Recorded], each: int, params: SamplingParams | None = None) -> float:
    """Decode the answers one after the other, with ``each`` guesses a step; returns tokens per step, without the steps
    that end prompts and those that end answers, as an answer's end cuts off what else was accepted. NaN if there are no
    such steps. ``params``: with which the answers were drawn (default: greedily)."""
    tokens = steps = 0
    for record in recorded:
        given = params or SamplingParams()
        fields = {name: getattr(given, name) for name in given.__dataclass_fields__}
        request = Request(
            key=next(_KEYS), prompt=record.prompt, params=SamplingParams(**fields | {"max_tokens": 1 << 20})
        )
        for emitted in _decode(drafter, request, record, each):
            tokens, steps = tokens + emitted, steps + 1
    return tokens / steps if steps else float("nan")


def _decode(drafter: Drafter, request: Request, record: Recorded, each: int):
    """The tokens of each step but for the first and the last."""
    answer = record.answer.tolist()
    _take(drafter, Drafts(trees=[NO_DRAFT], wants_heads=True), request, record, answer[:1], [])
    while len(request.output) < len(answer):
        begun = len(request.output)
        drafts = drafter.draft([request], [min(drafter.depth, len(answer) - begun - 1)], each, 0)
        draft = drafts.trees[0]
        children = {
            (p, t): i + 1
            for i, (p, t) in enumerate(zip(draft.parents.tolist(), draft.tokens[1:].tolist(), strict=True))
        }
        path: list[int] = []
        while begun + len(path) < len(answer):
            node = children.get((path[-1] if path else 0, answer[begun + len(path)]))
            if node is None:
                break
            path.append(node)
        emitted = answer[begun : begun + len(path) + 1]
        _take(drafter, drafts, request, record, emitted, path[: len(emitted)])
        if not request.finish_reason:
            yield len(emitted)


def _take(
    drafter: Drafter, drafts: Drafts, request: Request, record: Recorded, emitted: list[int], path: list[int]
) -> None:
    request.output.extend(emitted)
    at = len(request.output) - 1
    if at == len(record.answer) - 1:
        request.finish_reason = FinishReason.LENGTH
    request.head_candidates = HeadCandidates(record.ids_PKR[at], record.logits_PKR[at])
    drafter.learn(drafts, [RequestStepResult(request, emitted, path[: len(emitted)])], 0.0)
