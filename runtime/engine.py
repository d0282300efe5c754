"""The engine loop: rank 0 plans, all ranks execute, rank 0 applies the results.

The leader calls ``step`` while there is work and ``keep_alive`` while there is none. The other ranks run ``follow``
until the leader calls ``stop``. No rank waits longer than the step timeout for another.
"""

import secrets
import time
from collections.abc import Callable

import numpy as np

from euryale.parallel.group import Group
from euryale.runtime.config import EngineConfig
from euryale.runtime.startup import Loaded, load, make_scheduler
from euryale.runtime.step import StartedStep
from euryale.scheduler import plan_codec
from euryale.scheduler.scheduler import FinishedStep, Scheduler
from euryale.scheduler.step_plan import PlanKind, Segment, StepPlan
from euryale.scheduler.trace import Trace


class GroupDiverged(RuntimeError):
    """A rank accepted other tokens than rank 0, so the group must stop."""


class Engine:
    """One rank's engine. The leader calls ``step``, the other ranks run ``follow``."""

    def __init__(self, config: EngineConfig, group: Group, loaded: Loaded | None = None) -> None:
        """``loaded``: a model to use instead of the one in ``config``.

        Raises ValueError on every rank if the model cannot be served.
        """
        self.config = config
        self.group = group
        with group.agreed():  # an unusable trace file is refused before anything is loaded
            self._trace = Trace(config.trace) if config.trace and group.is_leader else None
        self.loaded = loaded or load(config, group)
        self.runner = self.loaded.runner
        # The epoch distinguishes this run of the group from an earlier one.
        drawn = np.asarray([secrets.randbits(31)], dtype=np.int32) if group.is_leader else None
        self.epoch = int(group.broadcast(drawn)[0])
        self._last_sent = time.monotonic()
        self._scheduler = make_scheduler(config, self.loaded, group, self._run) if group.is_leader else None
        # A GPU computes while the host does other work. On a CPU both compete for the same cores.
        self.overlaps = config.loop == "overlapped" or (config.loop == "auto" and group.device.type == "cuda")
        self._heartbeat = min(2.0, config.step_timeout / 4)  # seconds

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler. Only the leader has one."""
        assert self._scheduler is not None, "only the leader has a scheduler"
        return self._scheduler

    def step(self, meanwhile: Callable[[], None] | None = None) -> FinishedStep:
        """Plan one step, run it on all ranks, apply its results and return them. For the leader only.

        ``meanwhile``: called while the device computes in the overlapped loop, and before the step in the plain loop.
        It may add requests and must not cancel any. Raises RankLost if another rank died or exceeded the step timeout.
        """
        if meanwhile and not self.overlaps:
            meanwhile()
        begun = time.perf_counter()
        planned = self.scheduler.plan(self.epoch, self.runner.digest)
        started = self._start(planned.plan)
        if meanwhile and self.overlaps:
            meanwhile()
        results = self.runner.finish(started)
        finished = self.scheduler.advance(planned, results)
        self.scheduler.observe(finished, time.perf_counter() - begun)
        if self._trace:
            self._trace.write(self.scheduler, finished)
        return finished

    def keep_alive(self) -> None:
        """Send the other ranks a heartbeat if one is due. Call it often while there is no work."""
        if time.monotonic() - self._last_sent > self._heartbeat:
            self._send(PlanKind.HEARTBEAT)
        if self._trace:
            self._trace.flush_old()

    def stop(self) -> None:
        """Make the other ranks return from ``follow``."""
        self._send(PlanKind.STOP)
        if self._trace:
            self._trace.flush()

    def close(self) -> None:
        """Leave the group. Drops recordings first: a communicator cannot close while they hold its collectives."""
        self.runner.graphs = None
        self.group.close()

    def follow(self) -> None:
        """Execute the leader's plans until it stops. Raises GroupDiverged if this rank's tokens differ."""
        while True:
            plan = plan_codec.decode(self.group.broadcast(None), self.epoch)
            if plan.digest != self.runner.digest:
                raise GroupDiverged(
                    f"step {plan.step}: this rank's digest of accepted tokens is {self.runner.digest:08x}, rank 0's is "
                    f"{plan.digest:08x}: the ranks computed different tokens; restart the group, and check that all "
                    "hosts have the same files and versions"
                )
            if plan.kind == PlanKind.STOP:
                return
            self.runner.run(plan)

    def _start(self, plan: StepPlan) -> StartedStep | None:
        """Send the plan to the other ranks and start it here."""
        if self.group.size > 1:
            self.group.broadcast(plan_codec.encode(plan))
        self._last_sent = time.monotonic()
        return self.runner.start(plan)

    def _run(self, segments: list[Segment]) -> None:
        """Run a step of synthetic requests on all ranks."""
        self.runner.finish(self._start(StepPlan(epoch=self.epoch, digest=self.runner.digest, segments=segments)))

    def _send(self, kind: PlanKind) -> None:
        if self.group.size > 1:
            plan = StepPlan(kind=kind, epoch=self.epoch, step=self.scheduler.num_steps, digest=self.runner.digest)
            self.group.broadcast(plan_codec.encode(plan))
        self._last_sent = time.monotonic()
