"""Runs one worker process: tie it to its agent, join the group, prepare, load, lead or follow, exit.

An error that a user can mend ends all ranks. The first rank of every host prints one line that says what to do and
exits with code 2. The others exit with 0, which keeps them out of torchrun's report.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn, TypeVar

from euryale.parallel.group import join, speaks_for_host
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine

_PR_SET_PDEATHSIG = 1
T = TypeVar("T")  # result of ``prepare``


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, so that no worker outlives a killed agent."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call
        os._exit(1)


def run_worker(
    make_config: Callable[[], EngineConfig],
    prepare: Callable[[EngineConfig], contextlib.AbstractContextManager[T]],
    lead: Callable[[Engine, T], None],
) -> int:
    """Run this rank and return its exit code.

    The leader enters ``prepare(config)`` before the model is loaded and calls ``lead(engine, prepared)`` afterwards.
    The other ranks follow. A ValueError in either ends the whole group.
    """
    start_worker()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        try:
            config = make_config()
            group = join(config.step_timeout, config.device)
            run: Callable[[Engine], None] = _follow
            with group.agreed():
                if group.is_leader:
                    run = partial(_lead, stack.enter_context(prepare(config)), lead)
            engine = Engine(config, group)
            run(engine)
        except ValueError as error:
            return refuse(error)
        except KeyboardInterrupt:
            return 130
    engine.close()
    return 0


def _lead(prepared: T, lead: Callable[[Engine, T], None], engine: Engine) -> None:
    """Lead, then release the other ranks. After an error of the group itself there is no rank left to release."""
    try:
        lead(engine, prepared)
    except (ValueError, KeyboardInterrupt):
        engine.stop()
        raise
    engine.stop()


def _follow(engine: Engine) -> None:
    """Follow and ignore signals: the leader handles them and stops the other ranks."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine.follow()


def start_worker() -> None:
    """Tie this process to torchrun's agent, if one started it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def refuse(error: Exception) -> int:
    """Print the error on one line, once per host, and return this rank's exit code: 2, or 0 if another rank prints."""
    if not speaks_for_host():
        return 0
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 2


def leave(code: int) -> NoReturn:
    """Exit with ``code`` without the interpreter's teardown. Call it when everything is closed.

    Native threads of libraries may abort during teardown, which would turn a clean stop into an error. One stop ended
    in SIGABRT; that teardown caused it is an assumption.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
