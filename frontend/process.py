"""The front end's process: how the engine starts it, and its entry point.

The process must not import torch, which takes seconds and hundreds of megabytes that tokenizing does not need.
"""

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from euryale.frontend.config import FrontEndConfig
from euryale.frontend.engine_link import EngineLink, FrontEndLink, LinkLost
from euryale.frontend.messages import Drained, Failed, Loading

START_TIMEOUT = 120.0  # seconds in which the front end must load its tokenizer
POLL_MS = 200  # milliseconds between two checks that the process still runs
END_TIMEOUT = 4.0  # seconds in which it must exit; below any step timeout, because the other ranks wait meanwhile


class FrontEndProcess:
    """The front end's process and the link to it, from before the model is loaded until the server ends.

    A context manager: entering starts the process and waits until it has loaded its tokenizer and listens at
    ``address``. Raises ValueError if it cannot. Clients that connect before the engine's Welcome wait.
    """

    def __init__(self, model: str, vocab_size: int, config: FrontEndConfig) -> None:
        """``model``: the model's directory. ``vocab_size``: upper bound of token ids."""
        self.link = EngineLink()
        self.address = ""
        self.is_serving = False
        self._settings = {
            "endpoint": self.link.endpoint,
            "model": model,
            "vocab_size": vocab_size,
            "config": dataclasses.asdict(config),
            "cores": sorted(os.sched_getaffinity(os.getppid())),  # those of the launcher, not only of this rank
        }
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "FrontEndProcess":
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "euryale.frontend.process", json.dumps(self._settings)],
                env=os.environ | {"PYTHONPATH": _python_path()},
            )
            self.address = self._wait()
            self.link.send(Loading())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_serving:  # loading failed, so no request was accepted
            with contextlib.suppress(LinkLost):
                self.link.send(Drained())
        self._end()

    def _wait(self) -> str:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            for message in self.link.receive(POLL_MS):
                if isinstance(message, Failed):
                    raise ValueError(message.reason)
                return message.endpoint
            if self.link.lost or (self._process and self._process.poll() is not None):
                raise ValueError("the front end's process died while starting: see its message above")
        raise ValueError(f"the front end did not start within {START_TIMEOUT:.0f} s: start the server again")

    def _end(self) -> None:
        self.link.close()
        if self._process is not None:
            try:
                self._process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _python_path() -> str:
    """Return the process's PYTHONPATH: this package's location, then that of the environment."""
    found = str(Path(__file__).absolute().parents[2])
    return os.pathsep.join([found, *filter(None, [os.environ.get("PYTHONPATH")])])


def main() -> None:
    """Run the front end with the settings in the command line until the server ends."""
    settings = json.loads(sys.argv[1])
    os.sched_setaffinity(0, settings["cores"])  # undo the affinity of the rank that starts this process
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the engine handles them and begins the drain
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    # transformers loads tokenizers without torch if importing torch fails, which this entry causes.
    sys.modules["torch"] = None  # type: ignore[assignment]  # None is documented to block an import
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from euryale.frontend.frontend import FrontEnd
    from euryale.frontend.tokenizer import load_tokenizer

    link = FrontEndLink(settings["endpoint"])
    try:
        tokenizer = load_tokenizer(settings["model"], settings["vocab_size"])
        front_end = FrontEnd(tokenizer, link, FrontEndConfig(**settings["config"]))
    except ValueError as error:
        link.send(Failed(reason=str(error)))
        link.close(1000)
        return
    front_end.run()


if __name__ == "__main__":
    main()
