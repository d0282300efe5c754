"""Replay of recorded answers with dynamic trees, without a model: their tokens and head candidates are known.

Replay measures dynamic trees, and trains the statistics that serving starts with. Shape suffixes: P positions, K heads,
R ranks.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from euryale.scheduler.request import FinishReason, Request
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.speculation.drafter import NO_DRAFT, Drafter, Drafts, RequestStepResult
from euryale.scheduler.step_result import HeadCandidates


@dataclass(frozen=True)
class AnswerRecord:
    """An answer with the head candidates along it.

    ``prompt`` and ``answer`` int32. ``ids_PKR`` int32 and ``logits_PKR`` float32: the heads' top-R candidates at the
    prompt's last token and at each token of the answer except the last.
    """

    prompt: np.ndarray
    answer: np.ndarray
    ids_PKR: np.ndarray
    logits_PKR: np.ndarray


_KEYS = itertools.count()


def replay(
    drafter: Drafter, recorded: list[AnswerRecord], num_draft_tokens: int, params: SamplingParams | None = None
) -> float:
    """Decode the answers one after the other with ``num_draft_tokens`` per step, and return the mean tokens per step.

    The first step of an answer, which ends its prompt, is not counted. Neither is its last step, because the answer's
    end truncates the accepted tokens. NaN if no steps are left. ``params``: sampling parameters of the answers
    (default: greedy).
    """
    tokens = steps = 0
    for record in recorded:
        sampling = params or SamplingParams()
        fields = {name: getattr(sampling, name) for name in sampling.__dataclass_fields__}
        request = Request(
            key=next(_KEYS), prompt=record.prompt, params=SamplingParams(**fields | {"max_tokens": 1 << 20})
        )
        for emitted in _decode(drafter, request, record, num_draft_tokens):
            tokens, steps = tokens + emitted, steps + 1
    return tokens / steps if steps else float("nan")


def _decode(drafter: Drafter, request: Request, record: AnswerRecord, num_draft_tokens: int) -> Iterator[int]:
    """Yield the number of tokens of each step except the first and the last."""
    answer = record.answer.tolist()

    def max_depths() -> list[int]:
        return [min(drafter.depth, len(answer) - len(request.output) - 1)]

    _advance(drafter, Drafts(trees=[NO_DRAFT], wants_heads=True), request, record, answer[:1], [])
    while len(request.output) < len(answer):
        begun = len(request.output)
        drafts = drafter.draft([request], max_depths, num_draft_tokens)
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
        _advance(drafter, drafts, request, record, emitted, path[: len(emitted)])
        if not request.finish_reason:
            yield len(emitted)


def _advance(
    drafter: Drafter, drafts: Drafts, request: Request, record: AnswerRecord, emitted: list[int], path: list[int]
) -> None:
    """Append the emitted tokens to the request and let the drafter learn from the step."""
    request.output.extend(emitted)
    at = len(request.output) - 1
    if at == len(record.answer) - 1:
        request.finish_reason = FinishReason.LENGTH
    request.head_candidates = HeadCandidates(record.ids_PKR[at], record.logits_PKR[at])
    drafter.learn(drafts, [RequestStepResult(request, emitted, path[: len(emitted)])])
