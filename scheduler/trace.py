"""Writes one JSON record per step: load, draft tokens proposed and accepted, and timing.

A file may hold the traces of several runs in sequence. Each begins with a line that has the key ``trace``, the version
of the format. Whole lines are written about once a second, so that a killed run loses at most its last second.
``docs/protocol.md`` explains the fields.
"""

import json
import logging
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from euryale.scheduler.scheduler import FinishedStep, Scheduler
from euryale.scheduler.speculation.drafter import RequestStepResult

logger = logging.getLogger("euryale.scheduler")

VERSION = 1
_MAX_DELAY = 1.0  # seconds until a line is written
_MAX_BUFFERED = 1 << 18  # characters


class Trace:
    """Writes the trace of one scheduler."""

    def __init__(self, path: str | Path) -> None:
        """Append a run to the file. Raises ValueError if the file cannot be written."""
        try:
            # None after a write failed; left open otherwise, until the process ends.
            self._file: FileIO | None = open(path, "ab", buffering=0)  # noqa: SIM115
            is_new = self._file.tell() == 0
        except OSError as error:
            raise ValueError(f"cannot write the trace {path}: {error.strerror}: give --trace another file") from error
        self._started = self._written = time.monotonic()
        self._lines: list[str] = []  # not written yet
        self._num_buffered = 0  # characters in them
        # An earlier run that was killed may have left an incomplete line.
        self._put("\n" * (not is_new) + json.dumps({"trace": VERSION, "started": time.time()}))
        self.flush()

    def write(self, scheduler: Scheduler, step: FinishedStep) -> None:
        """Record a step that the ``scheduler`` has just been advanced by."""
        self._put(json.dumps(record(scheduler, step, time.monotonic() - self._started)))
        if self._num_buffered > _MAX_BUFFERED:
            self.flush()
        else:
            self.flush_old()

    def flush_old(self) -> None:
        """Write the lines if the last write is long ago. Call this also while there are no steps."""
        if self._lines and time.monotonic() - self._written > _MAX_DELAY:
            self.flush()

    def flush(self) -> None:
        """Write all lines. A full disk ends the trace with a warning; the engine goes on."""
        lines, self._lines, self._num_buffered = self._lines, [], 0
        self._written = time.monotonic()
        if not lines or self._file is None:
            return
        try:
            rest = memoryview(("\n".join(lines) + "\n").encode())
            while rest:
                rest = rest[self._file.write(rest) :]  # a write may be partial
        except OSError as error:
            logger.warning("the trace ends here: %s", error)
            self._file.close()
            self._file = None

    def _put(self, line: str) -> None:
        self._lines.append(line)
        self._num_buffered += len(line)


def record(scheduler: Scheduler, step: FinishedStep, now: float) -> dict[str, Any]:
    """Return the record of a step; ``now``: seconds since the trace began."""
    admission, choice, plan = scheduler.admission, step.planned.choice, step.planned.plan
    decoding = [s for s in plan.segments if s.emits_tokens and s.num_new_tokens == 1]
    num_draft_tokens = sum(result.num_draft_tokens for result in step.results)
    expected = choice.expected_accepted_tokens if choice and choice.considers_drafts else None
    return {
        "t": round(now, 6),
        "step": plan.step,
        "running": len(admission.running),
        "waiting": len(admission.waiting),
        "decoding": len(decoding),
        "prompt_rows": sum(s.num_new_tokens for s in plan.segments) - len(decoding),
        "num_proposed_tokens": max(choice.num_proposed_tokens, num_draft_tokens) if choice else num_draft_tokens,
        "num_draft_tokens": num_draft_tokens,
        "num_accepted_tokens": sum(len(result.accepted_nodes) for result in step.results),
        "expected_accepted_tokens": None if expected is None else round(expected, 3),
        "predicted_seconds": round(choice.predicted_seconds, 6) if choice and choice.predicted_seconds else None,
        "seconds": round(step.seconds, 6),
        "pages_free": admission.pages.num_free,
        "requests": [
            {
                "key": result.request.key,
                "num_draft_tokens": result.num_draft_tokens,
                "num_accepted_tokens": len(result.accepted_nodes),
                "ranks": path_ranks(result),
            }
            for result in step.results
        ],
    }


def path_ranks(result: RequestStepResult) -> list[int | None]:
    """Return each accepted draft token's rank among the head candidates of its depth; None if it is not one of them."""
    heads = result.head_candidates.ids.tolist() if result.accepted_nodes and result.head_candidates is not None else []
    ranks: list[int | None] = []
    for depth, token in enumerate(result.tokens[: len(result.accepted_nodes)]):
        is_candidate = depth < len(heads) and token in heads[depth]
        ranks.append(heads[depth].index(token) if is_candidate else None)
    return ranks


def read(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the step records of each run in the file, without incomplete lines of killed runs.

    Raises ValueError if the file cannot be read or is not a trace."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read the trace {path}: {error.strerror}") from error
    steps: list[dict[str, Any]] | None = None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "trace" in row:
            if row["trace"] != VERSION:
                raise ValueError(f"{path} has version {row['trace']}, but this program reads version {VERSION} only")
            if steps is not None:
                yield steps
            steps = []
        elif steps is not None:
            steps.append(row)
    if steps is None:
        raise ValueError(f"{path} is not a trace: no line has the key trace; give a file that --trace wrote")
    yield steps
