"""The real scheduler with a simulated machine, model and clock.

A step takes the time of ``machine.Machine`` with some noise. Every tree is walked along the request's predefined
answer, with the acceptance rule of greedy decoding. Measured times go back to the scheduler. Its cost profile is taken
from the same simulated machine, by the function that profiles real machines.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from euryale.benchmarks.simulate.heads import Answer, Answers
from euryale.benchmarks.simulate.machine import Machine
from euryale.runtime import step_profiler as profile
from euryale.scheduler.limits import SchedulerLimits
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.scheduler import PlannedStep, Scheduler
from euryale.scheduler.speculation.draft_budget import DraftBudget
from euryale.scheduler.speculation.drafter import Drafter, StaticDrafter
from euryale.scheduler.speculation.dynamic_drafter import DynamicDrafter, Sources
from euryale.scheduler.speculation.tree import TreeShape
from euryale.scheduler.step_cost import Profile, StepCosts
from euryale.scheduler.step_plan import Segment
from euryale.scheduler.step_result import RequestOutput, SegmentResult
from euryale.scheduler.trace import record

PAGE = 16
_NOISE, _PROFILE_NOISE = 0.02, 0.03  # standard deviations of the logarithm of step times
_OUTLIER, _OUTLIER_FACTOR = 0.001, 3.0  # probability of an outlier, and factor on its time


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is simulated, except the load.

    ``tree``: a static tree's shape, "dynamic", or None for no speculation.
    """

    machine: Machine
    answers: Answers
    tree: TreeShape | str | None
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 2048
    max_tree_nodes: int = 64
    max_model_len: int = 4096
    seed: int = 0
    sources: Sources = field(default_factory=lambda: Sources(text=False, traffic=False, context=False))


@dataclass(frozen=True)
class Load:
    """``count`` requests in all.

    A closed loop keeps ``users`` requests running. With 0 ``users``, requests arrive at ``rate`` per second, in bursts
    of ``burst`` on average (1: a Poisson process). ValueError for an invalid rate or burst.
    """

    count: int
    users: int = 0
    rate: float = 0.0
    burst: float = 1.0

    def __post_init__(self) -> None:
        if not self.users and not (0 < self.rate < math.inf and 1 <= self.burst < math.inf):
            raise ValueError(f"the rate must be above 0 and the burst at least 1, not {self.rate} and {self.burst}")

    def arrivals(self, seed: int) -> Iterator[float]:
        """Yield the arrival times of requests in an open loop, seconds."""
        rng, now = np.random.default_rng([seed, 1]), 0.0
        while True:
            now += rng.exponential(self.burst / self.rate)
            yield from [now] * int(rng.geometric(1 / self.burst))


@dataclass
class Timing:
    """Times of one request in seconds: its ``arrival`` and its ``deliveries``, with ``tokens`` in all."""

    arrival: float
    deliveries: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.deliveries[0] - self.arrival

    @property
    def tpot(self) -> float:
        """Time per output token after the first."""
        return (self.deliveries[-1] - self.deliveries[0]) / max(1, self.tokens - 1)


class Simulation:
    """One run.

    Results: ``timings`` and ``requests`` by key, ``tokens``, ``ends`` and ``host_seconds`` of every step, arrival times
    ``issued``, and ``trace`` if ``keeps_trace``.
    """

    def __init__(self, setting: Setting, load: Load, keeps_trace: bool = False) -> None:
        self.setting, self.load, self.now = setting, load, 0.0
        self.timings: dict[int, Timing] = {}
        self.requests: dict[int, Request] = {}
        self.trace: list[dict] | None = [] if keeps_trace else None
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.issued: list[float] = []
        self.host_seconds: list[float] = []  # measured time of the scheduler, by step
        self._rng = np.random.default_rng([setting.seed, 2])
        self._answers: dict[int, Answer] = {}
        self.limits = make_limits(setting)
        self.scheduler = make_scheduler(setting, self.limits)

    def run(self) -> "Simulation":
        """Run until the last request ends."""
        arrivals = None if self.load.users else self.load.arrivals(self.setting.seed)
        coming = deque([0.0] * min(self.load.users, self.load.count) if arrivals is None else [next(arrivals)])
        while coming or self.scheduler.has_work:
            if not self.scheduler.has_work:
                self.now = max(self.now, coming[0])
            while coming and coming[0] <= self.now:
                self._add(coming.popleft())
                if arrivals and len(self.issued) < self.load.count:
                    coming.append(next(arrivals))
            ended = self._step()
            if arrivals is None:
                room = self.load.count - len(self.issued) - len(coming)
                coming.extend([self.now] * min(ended, room))
        return self

    def _add(self, when: float) -> None:
        key = len(self.issued)
        self.issued.append(when)
        answer = self._answers[key] = self.setting.answers.make(key)
        # The seed identifies the request of a segment.
        params = SamplingParams(max_tokens=len(answer.truth), ignore_eos=True, seed=key)
        self.requests[key] = Request(key=key, prompt=answer.prompt, params=params)
        self.timings[key] = Timing(when)
        self.scheduler.add(self.requests[key])

    def _step(self) -> int:
        """Run one step; returns the number of requests that ended in it."""
        begun = time.perf_counter()
        planned = self.scheduler.plan(0, 0)
        planning = time.perf_counter() - begun
        seconds = self._seconds(planned)
        results = [self._result(segment) for segment in planned.plan.segments if segment.emits_tokens]
        self.now += seconds
        begun = time.perf_counter()
        step = self.scheduler.advance(planned, results)
        self.scheduler.observe(step, seconds)
        self.host_seconds.append(planning + time.perf_counter() - begun)
        if self.trace is not None:
            self.trace.append(record(self.scheduler, step, self.now))
        return self._deliver(step.outputs)

    def _seconds(self, planned: PlannedStep) -> float:
        setting, machine = self.setting, self.setting.machine
        seconds = machine.seconds(planned.plan.segments, setting.answers.num_heads, setting.max_num_batched_tokens)
        seconds *= math.exp(_NOISE * self._rng.standard_normal())
        if self._rng.random() < _OUTLIER:
            seconds *= _OUTLIER_FACTOR
        choice, segments = planned.choice, planned.plan.segments
        num_draft_tokens = sum(segment.num_draft_tokens for segment in segments)
        return seconds + machine.host_seconds(
            len(segments), num_draft_tokens, choice is not None and choice.considers_drafts
        )

    def _result(self, segment: Segment) -> SegmentResult:
        """Return the longest path of the segment's tree along the answer, and the token after it."""
        answer, known = self._answers[segment.params.seed], segment.output_index
        root = segment.num_new_tokens - 1
        draft_tokens = zip(segment.parents.tolist(), segment.tokens[root + 1 :].tolist(), strict=True)
        children = {draft: node for node, draft in enumerate(draft_tokens, 1)}
        path: list[int] = []
        node = 0
        while children and (node := children.get((node, int(answer.truth[known + len(path)])), 0)):
            path.append(node)
        tokens = answer.truth[known : known + len(path) + 1].tolist()
        candidates = answer.head_candidates(known + len(tokens)) if segment.wants_head_candidates else None
        return SegmentResult(tokens=tokens, accepted_nodes=path, head_candidates=candidates)

    def _deliver(self, outputs: list[RequestOutput]) -> int:
        ended = 0
        for output in outputs:
            timing = self.timings[output.key]
            timing.deliveries.append(self.now)
            timing.tokens += len(output.tokens)
            if output.finish_reason:
                ended += 1
                del self._answers[output.key]
        self.tokens.append(sum(len(o.tokens) for o in outputs))
        self.ends.append(self.now)
        return ended


def make_limits(setting: Setting) -> SchedulerLimits:
    """Return the limits that the machine's memory allows."""
    return SchedulerLimits(
        max_model_len=setting.max_model_len,
        max_num_seqs=setting.max_num_seqs,
        max_num_batched_tokens=setting.max_num_batched_tokens,
        vocab_size=setting.answers.vocab_size,
        num_pages=setting.machine.pages(PAGE, setting.answers.num_heads),
        page_size=PAGE,
    )


def make_scheduler(setting: Setting, limits: SchedulerLimits) -> Scheduler:
    """Return a scheduler as an engine's leader makes it (``runtime/startup.py``), without the prefix cache, because
    prompts are random."""
    costs: StepCosts | None = None
    drafter: Drafter | None = None
    if isinstance(setting.tree, TreeShape):
        drafter = StaticDrafter(setting.tree)
    elif setting.tree == "dynamic":
        costs = StepCosts(make_profile(setting, limits))
        drafter = _dynamic(setting, limits, costs)
    return Scheduler(limits, drafter, enable_prefix_caching=False, costs=costs)


def _dynamic(setting: Setting, limits: SchedulerLimits, costs: StepCosts) -> Drafter:
    budget = DraftBudget(costs, limits.max_num_batched_tokens)
    return DynamicDrafter(setting.answers.num_heads, setting.max_tree_nodes, budget, sources=setting.sources)


def make_profile(setting: Setting, limits: SchedulerLimits) -> Profile:
    """Return the profile of the machine's step times, as it would be measured at start."""
    rng = np.random.default_rng([setting.seed, 3])

    def seconds(segments: list[Segment]) -> float:
        exact = setting.machine.seconds(segments, setting.answers.num_heads, limits.max_num_batched_tokens)
        return exact * math.exp(_PROFILE_NOISE * rng.standard_normal())

    def drafting(requests: int) -> float:
        machine = setting.machine
        return machine.host_seconds(requests, 0, True) - machine.host_seconds(requests, 0, False)

    heads = setting.answers.num_heads

    def time_step(step: Callable[[], object]) -> float:
        return cast("float", step())

    return profile.measure(seconds, limits, heads, steps=True, time_step=time_step, time_choice=drafting)
