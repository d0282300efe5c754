"""The leader's serving loop, between the front end's process and the engine.

Between two steps it handles the front end's messages. While there is no work it sleeps on the link and sends heartbeats
to the other ranks and the front end. It knows no client and no text.
"""

import logging
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any

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

STATS_INTERVAL = 0.5  # seconds between counters sent to the front end, which serve as heartbeats
SLEEP_MS = 200  # longest sleep in milliseconds, and so the longest delay of a signal


class Server:
    """Serves one engine until it is drained; LinkLost if the front end dies. For the leader only."""

    def __init__(self, engine: Engine, front_end: FrontEndProcess, name: str) -> None:
        """``name``: the model's name for clients; empty: the name of its directory."""
        self.engine = engine
        self.scheduler = engine.scheduler
        self.name = name or Path(engine.config.model).resolve().name
        self.front_end, self.link = front_end, front_end.link
        self.stats = EngineStats(engine.scheduler)
        self.is_draining = self.is_done = False
        self._stop_asked = False
        self._last_stats = 0.0
        self._outputs: list[RequestOutput] = []  # of the last step, not yet delivered
        self._postponed: deque[Any] = deque()  # messages to handle after the step
        self._are_stats_sent = False  # the front end has the counters of all steps

    def run(self) -> None:
        """Send the front end a Welcome, print the ready line and serve."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_stop_asked", True))
        self.link.send(messages.Welcome(info=self._info()))
        self.front_end.is_serving = True
        print(f"ready {self.front_end.address}", flush=True)
        while not self.is_done:
            self._turn()

    def _turn(self) -> None:
        """Run a step, or sleep if there is no work, and exchange messages."""
        if self._stop_asked and not self.is_draining:
            self.is_draining = True
            logger.info("draining: running requests may finish, new ones are refused")
            self.link.send(messages.BeginDrain())
        if self.scheduler.has_work:
            step = self.engine.step(self._exchange)
            self._outputs = step.outputs
            self.stats.count_step(step)
            self._are_stats_sent = False
        else:
            self._deliver()
            if not self._are_stats_sent:  # so that a client whose answer ended finds it counted
                self._send_stats()
            self._exchange(SLEEP_MS)
            self.engine.keep_alive()
        if self._postponed:
            self._deliver()  # a cancelled request's tokens come before its end
        while self._postponed and not self.is_done:
            self._handle(self._postponed.popleft())
        if time.monotonic() - self._last_stats > STATS_INTERVAL and not self.is_done:
            self._send_stats()

    def _send_stats(self) -> None:
        """Send the counters, which also serve as a heartbeat."""
        self.link.send(messages.Stats(values=self.stats.values()))
        self._last_stats, self._are_stats_sent = time.monotonic(), True

    def _exchange(self, wait_ms: int = 0) -> None:
        """Deliver the last step's outputs and receive messages.

        A step may be running: new requests are queued, and all other messages are postponed until it ends.
        """
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
        hashes: list[bytes] = []  # of the prompt's pages, equal for all samples
        for key, index, params in message.samples():
            request = Request(key=key, prompt=prompt, params=params, sample_index=index, page_hashes=list(hashes))
            try:
                self.scheduler.add(request)
                hashes = request.page_hashes
            except ValueError as error:
                self.link.send(messages.Rejected(key=key, code="invalid_request", message=str(error)))

    def _handle(self, message: Any) -> None:
        if isinstance(message, messages.CancelRequest):
            request = self.scheduler.cancel(message.key)
            if request is not None:
                self.stats.num_cancelled += 1
                cancelled = RequestOutput(message.key, [], request.finish_reason)
                self.link.send(messages.StepOutput(outputs=[cancelled]))
        elif isinstance(message, messages.Drain):
            self.link.send(messages.Drained())
            self.is_done = True

    def _info(self) -> dict[str, Any]:
        """The ``info`` of a Welcome."""
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
