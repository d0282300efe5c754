"""The life of one worker process: tie it to its agent, join the group, prepare, load, lead or follow, leave.

An error that a user can mend ends all ranks. The first rank of every host prints one line that says what to do and
leaves with exit code 2. The others leave with 0, which keeps them out of torchrun's report.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from euryale.parallel.group import join, speaks_for_host
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine

_PR_SET_PDEATHSIG = 1
T = TypeVar("T")  # what is prepared before a model is loaded


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, so that nothing outlives a killed agent."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)


def run_worker(
    make_config: Callable[[], EngineConfig],
    prepare: Callable[[EngineConfig], contextlib.AbstractContextManager[T]],
    lead: Callable[[Engine, T], None],
) -> int:
    """Run this rank and return its exit code. On the leader ``prepare(config)`` runs before anything is loaded, and
    ``lead(engine, what it gave)`` afterwards; the other ranks follow. ValueErrors of both end the whole group."""
    start_worker()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        try:
            config = make_config()
            group = join(config.step_timeout, config.device)
            prepared = None
            with group.agreed():
                if group.is_leader:
                    prepared = stack.enter_context(prepare(config))
            engine = Engine(config, group)
            if group.is_leader:
                _lead(engine, prepared, lead)
            else:
                _follow(engine)
        except ValueError as error:
            return refuse(error)
        except KeyboardInterrupt:
            return 130
    engine.close()
    return 0


def _lead(engine: Engine, prepared: T, lead: Callable[[Engine, T], None]) -> None:
    """Lead, then release the others; after an error of the group itself there is nobody to release."""
    try:
        lead(engine, prepared)
    except (ValueError, KeyboardInterrupt):
        engine.stop()
        raise
    engine.stop()


def _follow(engine: Engine) -> None:
    """Follow, deaf to signals: the leader hears them, finishes what it must and says when to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine.follow()


def start_worker() -> None:
    """Tie this process to torchrun's agent if one started it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def refuse(error: Exception) -> int:
    """Say on one line what cannot be done, once per host, and return this rank's exit code."""
    if not speaks_for_host():
        return 0
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 2


def leave(code: int) -> NoReturn:
    """End the process with ``code`` when all of ours is closed, without the interpreter's teardown: the native threads
    of the libraries below may abort in it, which would turn a clean stop into an error. (One stop was seen to end in
    SIGABRT; that teardown was the cause is a guess.)"""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
