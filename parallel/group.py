"""The tensor-parallel group: one process per rank, and the few collectives the runtime needs.

Everything above this package sees a ``Group`` and asks it to reduce, gather or broadcast; only this package
knows that there are ranks and how they talk: NCCL on CUDA, shared memory among the CPU ranks of one host, gloo
across hosts.
"""

import contextlib
import dataclasses
import datetime
import logging
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from euryale.kernels import cpu
from euryale.kernels.add_rms_norm import add_rms_norm
from euryale.parallel import shared_memory
from euryale.parallel.process_group import ProcessGroup
from euryale.parallel.shared_memory import RankLost, SharedMemory

logger = logging.getLogger("euryale.parallel")

PLAN_HEAD = 1024  # int32 words of a plan that travel in the first broadcast
LOADING_TIMEOUT = 1800.0  # seconds that ranks may differ in loading


@dataclass(frozen=True)
class Group:
    """A rank's view of its group. ``size`` 1 needs no process group: every collective is the identity."""

    rank: int
    size: int
    device: torch.device
    collectives: SharedMemory | ProcessGroup | None = None
    loading_group: dist.ProcessGroup | None = None  # for loading, where ranks may be minutes apart; gloo, CPU tensors
    timeout: float = 30.0  # seconds that ranks wait for each other in a step
    plans: SharedMemory | None = None  # how plans travel, if not as everything else: a GPU need not be asked for them

    @property
    def is_leader(self) -> bool:
        """Whether this process plans the steps and talks to the outside."""
        return self.rank == 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of ``x`` over the ranks, the same bits on every rank, taken in float32. ``x`` is consumed."""
        return x if self.size == 1 else self.collectives.all_reduce(x)

    def all_reduce_add_rms_norm(
        self, share: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``kernels.add_rms_norm`` of the sum of the ranks' ``share`` [T, D], which is consumed, as is ``residual``."""
        if self.size == 1:
            return add_rms_norm(share, residual, weight, eps)
        return self.collectives.all_reduce_add_rms_norm(share, residual, weight, eps)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x`` [...], stacked in rank order: [size, ...]."""
        return x[None] if self.size == 1 else self.collectives.all_gather(x)

    def minimum(self, value: int) -> int:
        """The smallest of the ranks' values; for use while loading."""
        return value if self.size == 1 else int(self.gather_while_loading(torch.tensor([value])).min())

    def gather_while_loading(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's CPU tensor ``x`` [...], stacked: [size, ...]; for use while loading."""
        out = torch.empty((self.size, *x.shape), dtype=x.dtype)
        dist.all_gather(list(out.unbind(0)), x, group=self.loading_group)
        return out

    def share(self, count: int) -> slice:
        """This rank's items of ``count`` that are dealt out one by one."""
        return slice(self.rank, count, self.size)

    def broadcast(self, buffer: np.ndarray | None) -> np.ndarray:
        """Send the leader's int32 ``buffer`` [n] to all ranks; others pass None. What it means is not known here.

        The first PLAN_HEAD words travel with the length, so that a small buffer costs one collective.
        """
        if self.size == 1:
            return buffer
        head = torch.zeros(PLAN_HEAD + 1, dtype=torch.int32)
        if buffer is not None:
            whole = torch.from_numpy(buffer)
            head[0] = len(whole)
            head[1 : 1 + min(len(whole), PLAN_HEAD)] = whole[:PLAN_HEAD]
        travel = self.plans or self.collectives
        head = travel.broadcast(head)
        length = int(head[0])
        if length <= PLAN_HEAD:
            return head[1 : 1 + length].numpy()
        rest = whole[PLAN_HEAD:] if buffer is not None else torch.empty(length - PLAN_HEAD, dtype=torch.int32)
        return torch.cat([head[1:], travel.broadcast(rest)]).numpy()

    def agree(self, error: str | None) -> None:
        """Raise on every rank if any rank has an error to report, so that none waits for one that gave up; for use
        while loading. Raises ValueError with all ranks' messages.
        """
        if self.size == 1:
            errors = [error]
        else:
            text = torch.zeros(1024, dtype=torch.uint8)
            raw = (error or "").encode()[:1024]
            text[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else text[:0]
            gathered = self.gather_while_loading(text)
            errors = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in gathered]
        distinct = list(dict.fromkeys(e for e in errors if e))
        if distinct:
            raise ValueError("; ".join(distinct))

    def agree_on(self, facts: dict[str, object]) -> None:
        """Raise ValueError on every rank, naming the first of the ``facts`` that is not the same on all; every rank
        gives facts of the same names, which compare as text. For use while loading."""
        if self.size == 1:
            return
        names = [zlib.crc32(str(fact).encode()) for fact in facts.values()]
        differs = self.gather_while_loading(torch.tensor(names)) != torch.tensor(names)
        for (name, fact), ranks in zip(facts.items(), differs.T, strict=True):
            if ranks.any():
                others = ", ".join(str(int(rank)) for rank in ranks.nonzero())
                raise ValueError(
                    f"the ranks were not started alike: {name} is {str(fact)[:60]} on rank {self.rank} and "
                    f"something else on {others}; give every node the same"
                )

    @contextlib.contextmanager
    def agreed(self, *kinds: type[Exception]) -> Iterator[None]:
        """Run a piece, on every rank or with nothing to do on some, and wait for all: ValueError everywhere if it
        raised an error of these ``kinds`` (ValueError and OSError always are) anywhere."""
        error = None
        try:
            yield
        except (ValueError, OSError, *kinds) as problem:
            error = str(problem)
        self.agree(error)

    @property
    def can_record(self) -> bool:
        """Whether a step's collectives are native calls or NCCL's, which a recording (kernels/graph.py) can repeat."""
        return self.size == 1 or isinstance(self.collectives, SharedMemory) or self.device.type == "cuda"

    def check(self, status: int) -> None:
        """Raise what the recorded collective that returned ``status`` would have raised; 0 is none."""
        if status:
            self.collectives.check(status)

    def wait_for_device(self) -> None:
        """Wait for this rank's GPU, which may wait for other ranks' in a recorded collective: RankLost if it takes
        longer than the timeout. A CPU has done its work when it returns."""
        if self.device.type != "cuda" or self.size == 1:
            return
        done, started = torch.cuda.Event(), time.monotonic()
        done.record()
        while not done.query():
            waited = time.monotonic() - started
            if waited > self.timeout:
                raise RankLost(f"the GPUs did not finish a step within {self.timeout:.0f} s (--step-timeout)")
            time.sleep(0 if waited < 0.1 else 1e-3)

    def close(self) -> None:
        """Leave the group. Does not wait for the others."""
        if self.size > 1:
            self.collectives.close()
            if self.plans is not None:
                self.plans.close()
            dist.destroy_process_group()


def single(device: str | torch.device = "cpu") -> Group:
    """A group of one, for offline use and tests."""
    return Group(0, 1, torch.device(device))


def join(timeout: float = 30.0, device: str = "auto") -> Group:
    """Join the group that torchrun started this process for; alone if there is none.

    ``timeout`` seconds bound every collective of a step: a rank that waits longer raises instead of hanging.
    ``device``: "cpu", "cuda" or "auto" (the GPUs if there are any). Raises ValueError if a rank has no GPU.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    cores = len(os.sched_getaffinity(0))
    chosen = _choose_device(device)
    if size == 1:
        return Group(rank, size, chosen)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=limit)
    loading_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=LOADING_TIMEOUT))
    group = Group(rank, size, chosen, ProcessGroup(size, chosen), loading_group, timeout)
    is_one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
    if not is_one_host or not group.minimum(cpu.library() is not None):
        return group
    shared = _share_memory(group, timeout, cores)
    if chosen.type == "cuda":
        return dataclasses.replace(group, plans=shared)
    return dataclasses.replace(group, collectives=shared or group.collectives)


def _share_memory(group: Group, timeout: float, cores: int) -> SharedMemory | None:
    """Memory shared by all ranks of this host, which has so many ``cores``, or None on every rank if any cannot have
    it."""
    shared, fd, error = None, -1, None
    with contextlib.suppress(OSError):
        fd = shared_memory.create(group.size) if group.is_leader else -1
    place = group.gather_while_loading(torch.tensor([os.getpid(), fd]))[0].tolist()
    try:
        own = fd if fd >= 0 else shared_memory.open_of(*place)
        shared = SharedMemory(own, group.rank, group.size, timeout, may_spin=group.size <= cores)
    except OSError as problem:
        error = problem
    if group.minimum(shared is not None):
        return shared
    logger.warning(
        "the ranks talk over gloo, which is slower: no memory to share (%s)", error or "another rank's error"
    )
    if shared is not None:
        shared.close()
    return None


def _choose_device(wanted: str) -> torch.device:
    """This process's device; on a CPU the cores are shared out among the host's ranks, of which torchrun's default
    of one thread each would waste most, and kept apart."""
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not available):
        cores = sorted(os.sched_getaffinity(0))
        share = len(cores) // local_size
        torch.set_num_threads(max(1, share))
        if local_size > 1 and share:
            os.sched_setaffinity(0, cores[local_rank * share : (local_rank + 1) * share])
        return torch.device("cpu")
    if available < local_size:
        raise ValueError(
            f"{local_size} ranks on this host need {local_size} GPUs and there are {available}: "
            "start fewer ranks (--nproc-per-node) or give --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
