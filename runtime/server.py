"""Serving: the leader's loop between the front end's process and the engine.

Between two steps it takes what the front end sent; while nothing is to be done it sleeps on the link and now and
then tells the other ranks and the front end that it lives. It knows no client and no text.
"""

import logging
import signal
import time
from collections import deque
from pathlib import Path

import numpy as np

from euryale.frontend import messages
from euryale.frontend.engine_link import LinkLost
from euryale.frontend.process import FrontEndProcess
from euryale.runtime.engine import Engine
from euryale.runtime.model import generation_config
from euryale.scheduler.request import Request
from euryale.scheduler.stats import EngineStats
from euryale.scheduler.step_result import RequestOutput

logger = logging.getLogger("euryale.server")

SIGN_OF_LIFE = 0.5  # seconds between messages to the front end
SLEEP_MS = 200  # how long a signal may go unnoticed


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
        self.link.send(messages.Welcome(info=self._info()))
        self.front_end.is_serving = True
        print(f"ready {self.front_end.address}", flush=True)
        while not self.is_done:
            self._turn()

    def _turn(self) -> None:
        """Run a step or rest, with an exchange of messages."""
        if self._stop_asked and not self.is_draining:
            self.is_draining = True
            logger.info("draining: running requests may finish, new ones are refused")
            self.link.send(messages.BeginDrain())
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
        self.link.send(messages.Stats(values=self.stats.values()))
        self._last_sign, self._is_told = time.monotonic(), True

    def _exchange(self, wait_ms: int = 0) -> None:
        """Deliver the last step's outputs and take what arrived. A step may be under way: new requests are queued, all
        else is left for after it."""
        self._deliver()
        for message in self.link.receive(wait_ms):
            if isinstance(message, messages.AddRequest):
                self._add(message)
            else:
                self._postponed.append(message)
        if self.link.lost:
            raise LinkLost("the front end's process is gone")

    def _deliver(self) -> None:
        if self._outputs:
            self.link.send(messages.StepOutput(outputs=self._outputs))
            self._outputs = []

    def _add(self, message: messages.AddRequest) -> None:
        prompt = np.frombuffer(message.prompt, dtype="<i4")
        hashes: list[bytes] = []  # the same for all samples
        for key, index, params in message.samples():
            request = Request(key=key, prompt=prompt, params=params, sample_index=index, page_hashes=list(hashes))
            try:
                self.scheduler.add(request)
                hashes = request.page_hashes
            except ValueError as error:
                self.link.send(messages.Rejected(key=key, code="invalid_request", message=str(error)))

    def _handle(self, message) -> None:
        if isinstance(message, messages.CancelRequest):
            request = self.scheduler.cancel(message.key)
            if request is not None:
                self.stats.num_cancelled += 1
                cancelled = RequestOutput(message.key, [], request.finish_reason)
                self.link.send(messages.StepOutput(outputs=[cancelled]))
        elif isinstance(message, messages.Drain):
            self.link.send(messages.Drained())
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
