"""A line of JSON for every step: what ran, what was guessed, what came of it. Meant for people and plots.

A file may hold the traces of several runs, one below the other: each begins with a line that has the key ``trace``,
the version of the format. Lines are written some at a time, always whole ones, so that a killed run loses its last
second at most. The fields are explained in ``docs/protocol.md``.
"""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from euryale.scheduler.scheduler import FinishedStep, Scheduler
from euryale.scheduler.speculation.drafter import RequestStepResult

logger = logging.getLogger("euryale.scheduler")

VERSION = 1
_LONGEST_WAIT = 1.0  # seconds that a line may stay unwritten while there are steps, or a leader that rests
_MOST_WAITING = 1 << 18  # characters


class Trace:
    """Writes the steps of one scheduler."""

    def __init__(self, path: str | Path) -> None:
        """Begin a run at the end of the file; ValueError if it cannot be written."""
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by whoever ends the process)
            is_new = self._file.tell() == 0
        except OSError as error:
            raise ValueError(f"cannot write the trace {path}: {error.strerror}: give --trace another file") from error
        self._started = self._written = time.monotonic()
        self._waiting: list[str] = []
        self._length = 0
        # An earlier run that was killed while writing may have left half a line.
        self._put("\n" * (not is_new) + json.dumps({"trace": VERSION, "started": time.time()}))
        self.flush()

    def write(self, scheduler: Scheduler, step: FinishedStep) -> None:
        """Take the step that the scheduler was just advanced by, and how long it took."""
        self._put(json.dumps(record(scheduler, step, time.monotonic() - self._started)))
        if self._length > _MOST_WAITING:
            self.flush()
        else:
            self.flush_old()

    def flush_old(self) -> None:
        """Write what has waited long enough; call it also while there are no steps."""
        if self._waiting and time.monotonic() - self._written > _LONGEST_WAIT:
            self.flush()

    def flush(self) -> None:
        """Write what waits. A disk that is full ends the trace, not the run."""
        lines, self._waiting, self._length = self._waiting, [], 0
        self._written = time.monotonic()
        if not lines or self._file is None:
            return
        try:
            rest = memoryview(("\n".join(lines) + "\n").encode())
            while rest:
                rest = rest[self._file.write(rest) :]  # a full disk takes a part first
        except OSError as error:
            logger.warning("the trace ends here: %s", error)
            self._file.close()
            self._file = None

    def _put(self, line: str) -> None:
        self._waiting.append(line)
        self._length += len(line)


def record(scheduler: Scheduler, step: FinishedStep, now: float) -> dict:
    """What there is to say about a step; ``now``: seconds since the trace began."""
    admission, choice, plan = scheduler.admission, step.planned.choice, step.planned.plan
    decoding = [s for s in plan.segments if s.emits_tokens and s.num_new_tokens == 1]
    chosen = sum(test.num_draft_tokens for test in step.results)
    expected = choice.expected_accepted_tokens if choice and choice.considers_drafts else None
    return {
        "t": round(now, 6),
        "step": plan.step,
        "running": len(admission.running),
        "waiting": len(admission.waiting),
        "decoding": len(decoding),
        "prompt_rows": sum(s.num_new_tokens for s in plan.segments) - len(decoding),
        "num_proposed_tokens": max(choice.num_proposed_tokens, chosen) if choice else chosen,
        "num_draft_tokens": chosen,
        "num_accepted_tokens": sum(len(test.accepted_nodes) for test in step.results),
        "expected_accepted_tokens": None if expected is None else round(expected, 3),
        "predicted_seconds": round(choice.predicted_seconds, 6) if choice and choice.predicted_seconds else None,
        "seconds": round(step.seconds, 6),
        "pages_free": admission.pages.num_free,
        "requests": [
            {
                "key": t.request.key,
                "num_draft_tokens": t.num_draft_tokens,
                "num_accepted_tokens": len(t.accepted_nodes),
                "ranks": path_ranks(t),
            }
            for t in step.results
        ],
    }


def path_ranks(test: RequestStepResult) -> list[int | None]:
    """Of each accepted guess its rank among those of the head of its depth; None if that did not name it."""
    named = test.head_candidates.ids.tolist() if test.accepted_nodes and test.head_candidates is not None else []
    ranks: list[int | None] = []
    for depth, token in enumerate(test.tokens[: len(test.accepted_nodes)]):
        is_named = depth < len(named) and token in named[depth]
        ranks.append(named[depth].index(token) if is_named else None)
    return ranks


def read(path: Path) -> Iterator[list[dict]]:
    """The steps of each run in the file; lines that a killed run left unfinished are left out. ValueError if the file
    cannot be read or holds no trace."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read the trace {path}: {error.strerror}") from error
    steps: list[dict] | None = None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "trace" in row:
            if row["trace"] != VERSION:
                raise ValueError(f"{path} is of version {row['trace']}, this program reads {VERSION}")
            if steps is not None:
                yield steps
            steps = []
        elif steps is not None:
            steps.append(row)
    if steps is None:
        raise ValueError(f"{path} is no trace: it has no line that begins one")
    yield steps
