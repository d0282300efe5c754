"""What the engine did so far, as counters that the front end shows to clients."""

import logging
import time
from collections import Counter, deque

from euryale.scheduler.scheduler import Output, Scheduler

logger = logging.getLogger("euryale.scheduler")

_RECENT = 256  # steps
_JUDGED_AFTER = 500  # guesses of the first head
_USELESS = 0.02  # share of them that are right


class EngineStats:
    """Counts steps and tokens of one scheduler; ``values`` is a flat map of numbers."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._started = time.monotonic()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.num_steps = self.num_tokens = self.num_decodes = self.num_finished = self.num_cancelled = 0
        self._lengths: Counter[int] = Counter()
        self._has_judged = False

    def count_step(self, outputs: list[Output], seconds: float) -> None:
        """Take a step's outputs and how long it took."""
        self.num_steps += 1
        self._recent.append(seconds)
        self._judge_heads()
        for output in outputs:
            self.num_decodes += 1
            self.num_tokens += len(output.tokens)
            self._lengths[len(output.tokens)] += 1
            self.num_finished += output.finish_reason is not None

    def values(self) -> dict:
        """Counters since start; ``step_ms`` is the mean of the last 256 steps, ``accepted_lengths`` counts decoding
        steps by the tokens they emitted; ``pages_free`` includes ``pages_kept``, those known by what they hold."""
        admission = self._scheduler.admission
        pages = admission.pages
        recent = sum(self._recent) / len(self._recent) if self._recent else 0.0
        return {
            "engine_uptime": time.monotonic() - self._started,
            "steps": self.num_steps,
            "step_ms": 1000 * recent,
            "generated_tokens": self.num_tokens,
            "decode_steps": self.num_decodes,
            "mean_accepted_length": self.num_tokens / self.num_decodes if self.num_decodes else 0.0,
            "accepted_lengths": {str(n): count for n, count in sorted(self._lengths.items())},
            "requests_running": len(admission.running),
            "requests_waiting": len(admission.waiting),
            "engine_finished": self.num_finished,
            "engine_cancelled": self.num_cancelled,
            "pages_total": pages.num_pages,
            "pages_free": pages.num_free,
            "pages_kept": pages.num_kept,
            "prompt_tokens_admitted": admission.num_prompt,
            "prompt_tokens_shared": admission.num_shared,
            "preemptions_for_pages": admission.num_preempted_for_pages,
            "preemptions_for_priority": admission.num_preempted_for_priority,
            "recomputed_tokens": admission.num_recomputed,
        }

    def _judge_heads(self) -> None:
        """Warn once if the heads are almost never right: heads of another model load without an error."""
        count, right = self._scheduler.num_first_guesses, self._scheduler.num_first_right
        if self._has_judged or count < _JUDGED_AFTER:
            return
        self._has_judged = True
        if right < _USELESS * count:
            logger.warning(
                "the first Medusa head named the right token in %d of %d cases: were the heads trained for this model "
                "and tokenizer? --tree off saves their cost",
                right,
                count,
            )
