"""Serving: the leader's loop between the front end's process and the engine.

Between two steps it takes what the front end sent; while nothing is to be done it sleeps on the link and now and
then tells the other ranks and the front end that it lives. It knows no client and no text.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from pathlib import Path

import numpy as np

from euryale.frontend import engine_link as links
from euryale.frontend.config import FrontEndConfig
from euryale.frontend.engine_link import EngineLink, LinkLost
from euryale.frontend.frontend import FrontEnd
from euryale.frontend.tokenizer import load_tokenizer
from euryale.runtime.engine import Engine
from euryale.runtime.model import generation_config
from euryale.scheduler.request import Request
from euryale.scheduler.stats import EngineStats
from euryale.scheduler.step_result import RequestOutput

logger = logging.getLogger("euryale.server")

SIGN_OF_LIFE = 0.5  # seconds between messages to the front end
SLEEP_MS = 200  # how long a signal may go unnoticed
FRONT_END_START = 120.0  # seconds a front end may need to load its tokenizer


def run_front_end(endpoint: str, model: str, vocab_size: int, config: FrontEndConfig, cores: set[int]) -> None:
    """The front end's process, free to use ``cores``: the rank that starts it is kept to its share of them. It outlives
    a killed engine just long enough to tell the clients."""
    os.sched_setaffinity(0, cores)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the engine hears them and begins the drain
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    link = links.FrontEndLink(endpoint)
    try:
        front_end = FrontEnd(load_tokenizer(model, vocab_size), link, config)
    except ValueError as error:
        link.send(links.Failed(reason=str(error)))
        link.close(1000)
        return
    front_end.run()


class FrontEndProcess:
    """The front end's process and the link to it, from before the model is loaded until the server ends.

    A context: it starts the process and waits until it listens at ``address`` with its tokenizer loaded. Raises
    ValueError if it cannot. Clients that connect before ``Server.run`` wait.
    """

    def __init__(self, model: str, vocab_size: int, config: FrontEndConfig) -> None:
        self.link = EngineLink()
        self.address = ""
        self.is_serving = False
        context = multiprocessing.get_context("spawn")
        cores = os.sched_getaffinity(os.getppid())  # whoever started us may use all of them
        arguments = (self.link.endpoint, model, vocab_size, config, cores)
        self._process = context.Process(target=run_front_end, args=arguments, name="front end", daemon=False)

    def __enter__(self) -> "FrontEndProcess":
        try:
            self._process.start()
            self.address = self._wait()
            self.link.send(links.Loading())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_serving:  # loading failed: nobody has been promised anything
            with contextlib.suppress(LinkLost):
                self.link.send(links.Drained())
        self._end()

    def _wait(self) -> str:
        deadline = time.monotonic() + FRONT_END_START
        while time.monotonic() < deadline:
            for message in self.link.receive(SLEEP_MS):
                if isinstance(message, links.Failed):
                    raise ValueError(message.reason)
                return message.endpoint
            if self.link.lost or self._process.exitcode is not None:
                raise ValueError("the front end's process died while starting: see its message above")
        raise ValueError(f"the front end did not start within {FRONT_END_START:.0f} s: start the server again")

    def _end(self) -> None:
        self.link.close()
        if self._process.pid is not None:
            self._process.join(4)  # less than any step timeout: the other ranks wait for the word to stop
            if self._process.exitcode is None:
                self._process.kill()


class Server:
    """Serves one engine until it is drained or its front end is gone. For the leader only."""

    def __init__(self, engine: Engine, front_end: FrontEndProcess, name: str) -> None:
        """``name``: what clients call the model (default: the directory's name)."""
        self.engine = engine
        self.scheduler = engine.scheduler
        self.name = name or Path(engine.config.model).resolve().name
        self.front_end, self.link = front_end, front_end.link
        self.stats = EngineStats(engine.scheduler)
        self.is_draining = self.is_done = False
        self._stop_asked = False
        self._last_sign = 0.0
        self._outputs: list[RequestOutput] = []  # of the last step, not yet delivered
        self._postponed: deque = deque()
        self._is_told = False  # the front end has the counters of all steps

    def run(self) -> None:
        """Introduce the engine to the front end, print the ready line, serve."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_stop_asked", True))
        self.link.send(links.Welcome(info=self._info()))
        self.front_end.is_serving = True
        print(f"ready {self.front_end.address}", flush=True)
        while not self.is_done:
            self._turn()

    def _turn(self) -> None:
        """Run a step or rest, with an exchange of messages."""
        if self._stop_asked and not self.is_draining:
            self.is_draining = True
            logger.info("draining: running requests may finish, new ones are refused")
            self.link.send(links.BeginDrain())
        if self.scheduler.has_work:
            step = self.engine.step(self._exchange)
            self._outputs = step.outputs
            self.stats.count_step(step)
            self._is_told = False
        else:
            self._deliver()
            if not self._is_told:  # clients that wait for their answers' end see it counted
                self._tell()
            self._exchange(SLEEP_MS)
            self.engine.keep_alive()
        if self._postponed:
            self._deliver()  # a cancelled request's tokens come before its end
        while self._postponed and not self.is_done:
            self._handle(self._postponed.popleft())
        if time.monotonic() - self._last_sign > SIGN_OF_LIFE and not self.is_done:
            self._tell()

    def _tell(self) -> None:
        """Send the counters, which also is a sign of life."""
        self.link.send(links.Stats(values=self.stats.values()))
        self._last_sign, self._is_told = time.monotonic(), True

    def _exchange(self, wait_ms: int = 0) -> None:
        """Deliver the last step's outputs and take what arrived. A step may be under way: new requests are queued, all
        else is left for after it."""
        self._deliver()
        for message in self.link.receive(wait_ms):
            if isinstance(message, links.AddRequest):
                self._add(message)
            else:
                self._postponed.append(message)
        if self.link.lost:
            raise LinkLost("the front end's process is gone")

    def _deliver(self) -> None:
        if self._outputs:
            self.link.send(links.StepOutput(outputs=self._outputs))
            self._outputs = []

    def _add(self, message: links.AddRequest) -> None:
        prompt = np.frombuffer(message.prompt, dtype="<i4")
        hashes: list[bytes] = []  # the same for all samples
        for key, index, params in message.samples():
            request = Request(key=key, prompt=prompt, params=params, sample_index=index, page_hashes=list(hashes))
            try:
                self.scheduler.add(request)
                hashes = request.page_hashes
            except ValueError as error:
                self.link.send(links.Rejected(key=key, code="invalid_request", message=str(error)))

    def _handle(self, message) -> None:
        if isinstance(message, links.CancelRequest):
            request = self.scheduler.cancel(message.key)
            if request is not None:
                self.stats.num_cancelled += 1
                cancelled = RequestOutput(message.key, [], request.finish_reason)
                self.link.send(links.StepOutput(outputs=[cancelled]))
        elif isinstance(message, links.Drain):
            self.link.send(links.Drained())
            self.is_done = True

    def _info(self) -> dict:
        loaded, limits = self.engine.loaded, self.scheduler.limits
        heads = loaded.runner.heads
        return {
            "model": self.name,
            "fingerprint": loaded.fingerprint,
            "max_model_len": limits.max_model_len,
            "vocab_size": limits.vocab_size,
            "world_size": self.engine.group.size,
            "num_medusa_heads": heads.num_heads if heads else 0,
            "max_request_tokens": limits.num_pages * limits.page_size,
            "defaults": generation_config.default_params(self.engine.config.model),
        }
