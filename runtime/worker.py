"""The life of one worker process: tie it to its agent, join the group, load, lead or follow, leave.

Errors a user can mend end all ranks with exit code 2 and one line that says what to do.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from euryale.parallel.group import join
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, so that nothing outlives a killed agent."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)


def _lead(engine: Engine, lead: Callable[[Engine], None]) -> None:
    """Lead, then release the others; after an error of the group itself there is nobody to release."""
    try:
        lead(engine)
    except (ValueError, KeyboardInterrupt):
        engine.stop()
        raise
    engine.stop()


def run_worker(make_config: Callable[[], EngineConfig], lead: Callable[[Engine], None]) -> int:
    """Run this rank: ``lead(engine)`` on the leader, following elsewhere. Returns the exit code."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun, not by hand
        die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        config = make_config()
        group = join(config.step_timeout, config.device)
    except ValueError as error:
        return _refuse(error)
    try:
        engine = Engine(config, group)
    except ValueError as error:
        return _refuse(error) if group.is_leader else 2
    if not group.is_leader:
        # The leader hears the signal, finishes what it must and says when to stop.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        engine.follow()
        engine.close()
        return 0
    try:
        _lead(engine, lead)
    except ValueError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return 130
    engine.close()
    return 0


def _refuse(error: ValueError) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


def leave(code: int) -> NoReturn:
    """End the process with ``code`` when all of ours is closed, without the interpreter's teardown: the native threads
    of the libraries below may abort in it, which would turn a clean stop into an error. (One stop was seen to end in
    SIGABRT; that teardown was the cause is a guess.)"""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
