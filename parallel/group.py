"""The tensor-parallel group: one process per rank, and the collectives that the runtime needs.

Other packages ask a ``Group`` to reduce, gather or broadcast. Only this package knows ranks and their transport: NCCL
among GPUs, shared memory among the CPU ranks of one host, gloo across hosts.
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
from euryale.parallel.shared_memory import RankLost, SharedMemoryCollectives
from euryale.parallel.torch_collectives import TorchCollectives

logger = logging.getLogger("euryale.parallel")

PLAN_HEAD = 1024  # int32 words of a plan that the first broadcast carries
LOADING_TIMEOUT = 1800.0  # seconds that ranks wait for each other while loading
Collectives = SharedMemoryCollectives | TorchCollectives


@dataclass(frozen=True)
class Group:
    """A rank's view of its group. A group of one has no collectives: each is the identity."""

    rank: int
    size: int
    device: torch.device
    collectives: Collectives | None = None
    loading_group: dist.ProcessGroup | None = None  # gloo, for CPU tensors; ranks may be minutes apart while loading
    timeout: float = 30.0  # seconds that ranks wait for each other in a step
    plan_collectives: SharedMemoryCollectives | None = None  # broadcast plans without the GPU; None: ``collectives`` do

    @property
    def is_leader(self) -> bool:
        """Whether this rank plans the steps and serves the clients."""
        return self.rank == 0

    @property
    def _peers(self) -> Collectives:
        assert self.collectives is not None, "a group of one has no collectives"
        return self.collectives

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum of ``x``, float32 or bfloat16, over the ranks, and consumes ``x``.

        Sums in float32, with the same bits on every rank. Like every collective, it raises RankLost if a rank died or
        exceeded the timeout.
        """
        return x if self.size == 1 else self._peers.all_reduce(x)

    def all_reduce_add_rms_norm(
        self, partial_sum: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ``kernels.add_rms_norm`` of the sum of the ranks' ``partial_sum`` [T, D] and ``residual`` [T, D].
        Consumes both."""
        if self.size == 1:
            return add_rms_norm(partial_sum, residual, weight, eps)
        return self._peers.all_reduce_add_rms_norm(partial_sum, residual, weight, eps)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Returns every rank's ``x`` [...], stacked in rank order: [size, ...]. Shapes and dtypes are the same."""
        return x[None] if self.size == 1 else self._peers.all_gather(x)

    def minimum(self, value: int) -> int:
        """Returns the smallest of the ranks' values; for use while loading."""
        return value if self.size == 1 else int(self.loading_gather(torch.tensor([value])).min())

    def loading_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Returns every rank's CPU tensor ``x`` [...], stacked in rank order: [size, ...]; for use while loading."""
        out = torch.empty((self.size, *x.shape), dtype=x.dtype)
        dist.all_gather(list(out.unbind(0)), x, group=self.loading_group)
        return out

    def own_items(self, count: int) -> slice:
        """This rank's part of ``count`` items, which the ranks take in turn."""
        return slice(self.rank, count, self.size)

    def broadcast(self, buffer: np.ndarray | None) -> np.ndarray:
        """Sends the leader's int32 ``buffer`` [n] to all ranks and returns it; the other ranks pass None.

        The first PLAN_HEAD words are sent together with the length, so that a small buffer needs one collective.
        """
        if self.size == 1:
            assert buffer is not None, "the leader has a buffer"
            return buffer
        head = torch.zeros(PLAN_HEAD + 1, dtype=torch.int32)
        if buffer is not None:
            whole = torch.from_numpy(buffer)
            head[0] = len(whole)
            head[1 : 1 + min(len(whole), PLAN_HEAD)] = whole[:PLAN_HEAD]
        collectives = self.plan_collectives or self._peers
        head = collectives.broadcast(head)
        length = int(head[0])
        if length <= PLAN_HEAD:
            return head[1 : 1 + length].numpy()
        rest = whole[PLAN_HEAD:] if buffer is not None else torch.empty(length - PLAN_HEAD, dtype=torch.int32)
        return torch.cat([head[1:], collectives.broadcast(rest)]).numpy()

    def agree(self, error: str | None) -> None:
        """Raises ValueError, with all ranks' messages, on every rank if any rank passes an ``error``, so that no rank
        waits for one that gave up. For use while loading."""
        if self.size == 1:
            errors = [error]
        else:
            text = torch.zeros(1024, dtype=torch.uint8)
            raw = (error or "").encode()[:1024]
            text[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else text[:0]
            gathered = self.loading_gather(text)
            errors = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in gathered]
        distinct = list(dict.fromkeys(e for e in errors if e))
        if distinct:
            raise ValueError("; ".join(distinct))

    def agree_on(self, facts: dict[str, object]) -> None:
        """Raises ValueError on every rank, which names the first fact that is not the same on all ranks. All ranks pass
        the same names; facts are compared as text. For use while loading."""
        if self.size == 1:
            return
        names = [zlib.crc32(str(fact).encode()) for fact in facts.values()]
        differs = self.loading_gather(torch.tensor(names)) != torch.tensor(names)
        for (name, fact), ranks in zip(facts.items(), differs.T, strict=True):
            if ranks.any():
                others = ", ".join(str(int(rank)) for rank in ranks.nonzero())
                raise ValueError(
                    f"the ranks were started with different settings: {name} is {str(fact)[:60]} on rank {self.rank} "
                    f"and differs on {others}; start all nodes with the same"
                )

    @contextlib.contextmanager
    def agreed(self, *kinds: type[Exception]) -> Iterator[None]:
        """Runs the body and waits until all ranks have run theirs. ValueError on every rank if the body raised
        ValueError, OSError or one of ``kinds`` on any."""
        error: str | None = None
        expected: tuple[type[Exception], ...] = (ValueError, OSError, *kinds)
        try:
            yield
        except expected as problem:
            error = str(problem)
        self.agree(error)

    @property
    def can_record(self) -> bool:
        """Whether a recording (kernels/graph.py) can repeat a step's collectives: native calls and NCCL's."""
        return self.size == 1 or isinstance(self.collectives, SharedMemoryCollectives) or self.device.type == "cuda"

    def check(self, status: int) -> None:
        """Raises RankLost if ``status``, which a recorded collective returned, is not 0."""
        if status:
            assert isinstance(self.collectives, SharedMemoryCollectives), "only native collectives return a status"
            self.collectives.check(status)

    def wait_for_device(self) -> None:
        """Waits for this rank's GPU, which may wait for other ranks in a recorded collective. RankLost if it takes
        longer than the timeout. Returns at once on CPUs, whose calls are synchronous."""
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
        """Leaves the group without waiting for the other ranks."""
        if self.size > 1:
            self._peers.close()
            if self.plan_collectives is not None:
                self.plan_collectives.close()
            dist.destroy_process_group()


def single(device: str | torch.device = "cpu") -> Group:
    """A group of one, for offline use and tests."""
    return Group(0, 1, torch.device(device))


def join(timeout: float = 30.0, device: str = "auto") -> Group:
    """Joins the group for which torchrun started this process; without torchrun, a group of one.

    ``timeout``: seconds after which a collective of a step raises RankLost instead of waiting. ``device``: "cpu",
    "cuda" or "auto" (GPUs if there are any). ValueError if a rank has no GPU.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    cores = len(os.sched_getaffinity(0))
    chosen = _choose_device(device)
    if size == 1:
        return Group(rank, size, chosen)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=limit)
    loading_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=LOADING_TIMEOUT))
    group = Group(rank, size, chosen, TorchCollectives(size, chosen), loading_group, timeout)
    is_one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
    if not is_one_host or not group.minimum(cpu.load() is not None):
        return group
    shared = _share_memory(group, timeout, cores)
    if chosen.type == "cuda":
        return dataclasses.replace(group, plan_collectives=shared)
    return dataclasses.replace(group, collectives=shared or group.collectives)


def speaks_for_host() -> bool:
    """Whether this process is the first rank of its host, or the only one; known before the group is joined."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _share_memory(group: Group, timeout: float, cores: int) -> SharedMemoryCollectives | None:
    """Collectives through memory shared by all ranks of this host, which has ``cores`` CPU cores. None on every rank if
    any rank cannot use it."""
    shared, fd = None, -1
    error: OSError | None = None
    try:
        shared_memory.library()
        fd = shared_memory.create(group.size) if group.is_leader else -1
    except OSError as problem:
        error = problem
    place = group.loading_gather(torch.tensor([os.getpid(), fd]))[0].tolist()
    if error is None:
        try:
            own = fd if fd >= 0 else shared_memory.open_of(*place)
            shared = SharedMemoryCollectives(own, group.rank, group.size, timeout, may_spin=group.size <= cores)
        except OSError as problem:
            error = problem
    if group.minimum(shared is not None):
        return shared
    logger.warning(
        "collectives use gloo, which is slower, because memory cannot be shared: %s",
        error or "another rank has an error",
    )
    if shared is not None:
        shared.close()
    return None


def _choose_device(wanted: str) -> torch.device:
    """This process's device. On CPUs it also divides the host's cores among its ranks and pins each rank to its own;
    torchrun's default of one thread per rank would leave most cores idle."""
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not available):
        cores = sorted(os.sched_getaffinity(0))
        per_rank = len(cores) // local_size
        torch.set_num_threads(max(1, per_rank))
        if local_size > 1 and per_rank:
            os.sched_setaffinity(0, cores[local_rank * per_rank : (local_rank + 1) * per_rank])
        return torch.device("cpu")
    if available < local_size:
        raise ValueError(
            f"{local_size} ranks on this host need {local_size} GPUs and there are {available}: "
            "start fewer ranks (--nproc-per-node) or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
