"""Counters of the engine since its start, which the front end reports to clients."""

import logging
import time
from collections import Counter, deque
from typing import Any

import numpy as np

from euryale.scheduler.scheduler import FinishedStep, Scheduler
from euryale.scheduler.speculation.drafter import RequestStepResult

logger = logging.getLogger("euryale.scheduler")

_NUM_RECENT = 256  # steps in the mean of ``step_ms``
_MIN_CANDIDATES = 500  # predictions of the first head before its accuracy is judged
_MIN_ACCURACY = 0.02  # below this the heads do not fit the model
_PATHS_AT_ONCE = 256  # accepted paths whose ranks are looked up together


class DraftStats:
    """Counts draft tokens: proposed, verified and accepted, the accepted ones also by depth and rank."""

    def __init__(self) -> None:
        self._num_proposed = self._num_draft_tokens = self._num_accepted = self._steps = self._predicted_steps = 0
        self.num_first_candidates = self.num_first_correct = 0  # of the first head's likeliest token
        self._expected = self._predicted = self._measured = 0.0
        self._depths: Counter[int] = Counter()
        self._ranks: Counter[int] = Counter()  # -1: not a head candidate of its depth
        self._paths: list[RequestStepResult] = []  # whose accepted draft tokens are not counted yet

    def count_step(self, step: FinishedStep) -> None:
        """Count the draft tokens of a step."""
        choice, num_draft_tokens = step.planned.choice, 0
        for result in step.results:
            num_draft_tokens += result.num_draft_tokens
            if result.accepted_nodes:
                self._paths.append(result)
            if result.head_candidates is not None:
                self.num_first_candidates += 1
                self.num_first_correct += int(result.tokens[0] == result.head_candidates.ids[0, 0])
        self._num_draft_tokens += num_draft_tokens
        self._steps += num_draft_tokens > 0
        self._num_proposed += max(choice.num_proposed_tokens, num_draft_tokens) if choice else num_draft_tokens
        if choice and choice.predicted_seconds:
            self._predicted_steps += 1
            self._expected += choice.expected_accepted_tokens
            self._predicted += choice.predicted_seconds
            self._measured += step.seconds
        if len(self._paths) >= _PATHS_AT_ONCE:
            self._count_paths()

    def values(self) -> dict[str, Any]:
        """Return the counters. Depths in ``accepted_tokens_by_depth`` begin at 1, ranks in ``accepted_tokens_by_rank``
        at 0; the rank "other" counts tokens that are not head candidates."""
        self._count_paths()
        return {
            "num_speculative_steps": self._steps,
            "num_proposed_tokens": self._num_proposed,
            "num_draft_tokens": self._num_draft_tokens,
            "num_accepted_tokens": self._num_accepted,
            "num_rejected_tokens": self._num_draft_tokens - self._num_accepted,
            "expected_accepted_tokens": self._expected,
            "accepted_tokens_by_depth": {str(d): n for d, n in sorted(self._depths.items())},
            "accepted_tokens_by_rank": {"other" if r < 0 else str(r): n for r, n in sorted(self._ranks.items())},
            "predicted_steps": self._predicted_steps,
            "predicted_seconds": self._predicted,
            "predicted_steps_seconds": self._measured,
        }

    def _count_paths(self) -> None:
        """Count the depths and ranks of all paths at once, which is much faster than one by one."""
        for length, count in Counter(len(path.accepted_nodes) for path in self._paths).items():
            self._num_accepted += length * count
            self._depths.update(dict.fromkeys(range(1, length + 1), count))
        with_heads = [(path, path.head_candidates.ids) for path in self._paths if path.head_candidates is not None]
        num_ranked = 0
        if with_heads:
            num_heads = len(with_heads[0][1])
            ids = np.concatenate([candidates for _, candidates in with_heads])
            tokens: list[int] = []
            rows: list[int] = []  # of ``ids``
            for number, (path, _) in enumerate(with_heads):
                length = min(len(path.accepted_nodes), num_heads)
                tokens += path.tokens[:length]
                rows += range(number * num_heads, number * num_heads + length)
            ranks = np.nonzero(ids[rows] == np.asarray(tokens)[:, None])[1]
            num_ranked = len(ranks)
            self._ranks.update(dict(enumerate(np.bincount(ranks).tolist())))
        self._ranks[-1] += sum(len(path.accepted_nodes) for path in self._paths) - num_ranked
        self._paths = []


class EngineStats:
    """Counts the steps, tokens and draft tokens of one scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._started = time.monotonic()
        self._recent: deque[float] = deque(maxlen=_NUM_RECENT)  # seconds
        self.num_steps = self.num_tokens = self.num_decodes = self.num_finished = self.num_cancelled = 0
        self._lengths: Counter[int] = Counter()
        self._drafts = DraftStats()
        self._has_judged = False

    def count_step(self, step: FinishedStep) -> None:
        """Count a step."""
        self.num_steps += 1
        self._recent.append(step.seconds)
        self._drafts.count_step(step)
        self._judge_heads()
        for output in step.outputs:
            self.num_decodes += 1
            self.num_tokens += len(output.tokens)
            self._lengths[len(output.tokens)] += 1
            self.num_finished += output.finish_reason is not None

    def values(self) -> dict[str, Any]:
        """Return the counters: numbers, and maps of numbers.

        ``step_ms`` is the mean of the last 256 steps. ``tokens_per_step`` counts decoding steps by the tokens they
        emitted. ``pages_free`` includes ``pages_cached``."""
        admission = self._scheduler.admission
        pages = admission.pages
        recent = sum(self._recent) / len(self._recent) if self._recent else 0.0
        return {
            "engine_uptime": time.monotonic() - self._started,
            "steps": self.num_steps,
            "step_ms": 1000 * recent,
            "generated_tokens": self.num_tokens,
            "decode_steps": self.num_decodes,
            "mean_acceptance_length": self.num_tokens / self.num_decodes if self.num_decodes else 0.0,
            "tokens_per_step": {str(n): count for n, count in sorted(self._lengths.items())},
            "requests_running": len(admission.running),
            "requests_waiting": len(admission.waiting),
            "engine_finished": self.num_finished,
            "engine_cancelled": self.num_cancelled,
            "pages_total": pages.num_pages,
            "pages_free": pages.num_free,
            "pages_cached": pages.num_cached,
            "prompt_tokens_admitted": admission.num_prompt_tokens,
            "prompt_tokens_cached": admission.num_cached_tokens,
            "preemptions_for_pages": admission.num_preempted_for_pages,
            "preemptions_for_priority": admission.num_preempted_for_priority,
            "recomputed_tokens": admission.num_recomputed,
            **self._drafts.values(),
        }

    def _judge_heads(self) -> None:
        """Warn once if the heads are almost never right; heads of another model load without an error."""
        count, num_correct = self._drafts.num_first_candidates, self._drafts.num_first_correct
        if self._has_judged or count < _MIN_CANDIDATES:
            return
        self._has_judged = True
        if num_correct < _MIN_ACCURACY * count:
            logger.warning(
                "the first Medusa head predicted %d of %d tokens correctly: check whether the heads fit this model and "
                "tokenizer, or save their cost with --tree off",
                num_correct,
                count,
            )
