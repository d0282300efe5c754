"""The engine loop. Rank 0 plans, all ranks execute, rank 0 applies the result; the others follow.

The leader calls ``step`` while there is work and ``keep_alive`` while there is none; the other ranks sit in
``follow`` until the leader's ``stop``. No rank waits longer than the step timeout for another.
"""

import secrets
import time
from collections.abc import Callable

import numpy as np

from euryale.parallel.group import Group
from euryale.runtime.config import EngineConfig
from euryale.runtime.startup import Loaded, load, make_scheduler
from euryale.scheduler import plan_codec
from euryale.scheduler.scheduler import FinishedStep
from euryale.scheduler.step_plan import PlanKind, Segment, StepPlan
from euryale.scheduler.trace import Trace


class GroupDiverged(RuntimeError):
    """A rank accepted other tokens than rank 0: the group must not go on."""


class Engine:
    """One rank of a worker group. ``scheduler`` is the leader's; the other ranks have none."""

    def __init__(self, config: EngineConfig, group: Group, loaded: Loaded | None = None) -> None:
        """``loaded`` None: what the config names, or ValueError, on every rank, for a model that cannot be served."""
        self.config = config
        self.group = group
        with group.agreed():  # refused before anything is loaded
            self._trace = Trace(config.trace) if config.trace and group.is_leader else None
        self.loaded = loaded or load(config, group)
        self.runner = self.loaded.runner
        # The epoch tells this run of the group from an earlier one.
        drawn = np.asarray([secrets.randbits(31)], dtype=np.int32) if group.is_leader else None
        self.epoch = int(group.broadcast(drawn)[0])
        self._last_sent = time.monotonic()
        self.scheduler = make_scheduler(config, self.loaded, group, self._run) if group.is_leader else None
        # A GPU works on while the host does something else; on a CPU the host would only come late.
        self.overlaps = config.loop == "overlapped" or (config.loop == "auto" and group.device.type == "cuda")
        self._heartbeat = min(2.0, config.step_timeout / 4)  # seconds

    def step(self, meanwhile: Callable[[], None] | None = None) -> FinishedStep:
        """Plan one step, run it on all ranks, and return what it brought.

        ``meanwhile`` is called, in the overlapped loop, while the device is at work; it may add requests and must not
        cancel any. In the plain loop it is called before the step.
        """
        if meanwhile and not self.overlaps:
            meanwhile()
        begun = time.perf_counter()
        planned = self.scheduler.plan(self.epoch, self.runner.digest)
        started = self._start(planned.plan)
        if meanwhile and self.overlaps:
            meanwhile()
        results = self.runner.finish(started)
        finished = self.scheduler.advance(planned, results, time.perf_counter() - begun)
        if self._trace:
            self._trace.write(self.scheduler, finished)
        return finished

    def keep_alive(self) -> None:
        """Tell the other ranks that the leader lives though it has nothing for them; call it often, it sends seldom."""
        if time.monotonic() - self._last_sent > self._heartbeat:
            self._send(PlanKind.HEARTBEAT)
        if self._trace:
            self._trace.flush_old()

    def stop(self) -> None:
        """Let the other ranks leave ``follow``."""
        self._send(PlanKind.STOP)
        if self._trace:
            self._trace.flush()

    def close(self) -> None:
        """Leave the group. A communicator ends only when no recording holds its collectives any more."""
        self.runner.graphs = None
        self.group.close()

    def follow(self) -> None:
        """Execute the leader's plans until it stops. Raises GroupDiverged if this rank's tokens differ."""
        while True:
            plan = plan_codec.decode(self.group.broadcast(None), self.epoch)
            if plan.digest != self.runner.digest:
                raise GroupDiverged(
                    f"step {plan.step}: this rank's digest is {self.runner.digest:08x}, rank 0's {plan.digest:08x}"
                )
            if plan.kind == PlanKind.STOP:
                return
            self.runner.run(plan)

    def _start(self, plan: StepPlan):
        """Have all ranks begin a step."""
        if self.group.size > 1:
            self.group.broadcast(plan_codec.encode(plan))
        self._last_sent = time.monotonic()
        return self.runner.start(plan)

    def _run(self, segments: list[Segment]) -> None:
        """A step of made-up requests, on all ranks."""
        self.runner.finish(self._start(StepPlan(epoch=self.epoch, digest=self.runner.digest, segments=segments)))

    def _send(self, kind: PlanKind) -> None:
        if self.group.size > 1:
            plan = StepPlan(kind=kind, epoch=self.epoch, step=self.scheduler.num_steps, digest=self.runner.digest)
            self.group.broadcast(plan_codec.encode(plan))
        self._last_sent = time.monotonic()
