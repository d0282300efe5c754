"""What the engine did so far, as counters that the front end shows to clients."""

import time
from collections import Counter, deque

from euryale.scheduler.scheduler import Output, Scheduler

_RECENT = 256  # steps


class EngineStats:
    """Counts steps and tokens of one scheduler; ``values`` is a flat map of numbers."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._started = time.monotonic()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.num_steps = self.num_tokens = self.num_decodes = self.num_finished = self.num_cancelled = 0
        self._lengths: Counter[int] = Counter()

    def count_step(self, outputs: list[Output], seconds: float) -> None:
        """Take a step's outputs and how long it took."""
        self.num_steps += 1
        self._recent.append(seconds)
        for output in outputs:
            self.num_decodes += 1
            self.num_tokens += len(output.tokens)
            self._lengths[len(output.tokens)] += 1
            self.num_finished += output.finish_reason is not None

    def values(self) -> dict:
        """Counters since start; ``step_ms`` is the mean of the last 256 steps, ``accepted_lengths`` counts decoding
        steps by the tokens they emitted."""
        pages = self._scheduler.pages
        recent = sum(self._recent) / len(self._recent) if self._recent else 0.0
        return {
            "engine_uptime": time.monotonic() - self._started,
            "steps": self.num_steps,
            "step_ms": 1000 * recent,
            "generated_tokens": self.num_tokens,
            "decode_steps": self.num_decodes,
            "mean_accepted_length": self.num_tokens / self.num_decodes if self.num_decodes else 0.0,
            "accepted_lengths": {str(n): count for n, count in sorted(self._lengths.items())},
            "requests_running": len(self._scheduler.running),
            "requests_waiting": len(self._scheduler.waiting),
            "engine_finished": self.num_finished,
            "engine_cancelled": self.num_cancelled,
            "pages_total": pages.num_pages,
            "pages_free": pages.num_free,
        }
