"""Collectives over shared memory: right in every size, quick to notice a death, and without a trace."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from serving import leftovers
from support import ROOT, free_port

from euryale.kernels.add_rms_norm import reference
from euryale.parallel.shared_memory import CAPACITY, SharedMemoryCollectives
from euryale.parallel.torch_collectives import TorchCollectives

SIZES = [1, 15, 4096, 4097, CAPACITY // 4, CAPACITY // 4 + 1, CAPACITY + 5]  # one-shot, two-shot, several pieces


def both_ways(group, count):
    """What shared memory and gloo make of the same numbers."""
    assert isinstance(group.collectives, SharedMemoryCollectives)
    gloo, found = TorchCollectives(group.size, group.device), []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(count, generator=torch.Generator().manual_seed(group.rank)).to(dtype)
        gathered = gloo.all_gather(x)
        expected = gathered[0].float()
        for part in gathered[1:]:
            expected = expected + part.float()
        found.append(torch.equal(group.all_reduce(x.clone()), expected.to(dtype)))
        found.append(torch.equal(group.all_gather(x), gathered))
        torch.testing.assert_close(gloo.all_reduce(x), expected.to(dtype))  # gloo's order of summing is its own
    return found


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("size", [2, 4])
def test_sums_are_exact_in_rank_order_and_gathers_whole(ranks, size, count):
    assert ranks(size).run(both_ways, count) == [[True] * 4] * size


def reduce_and_norm(group):
    torch.manual_seed(7)
    weight, residual, shares = torch.randn(72), torch.randn(9, 72), torch.randn(group.size, 9, 72)
    total = shares[0]
    for share in shares[1:]:
        total = total + share
    for added in (residual, None):
        normed, new = group.all_reduce_add_rms_norm(shares[group.rank].clone(), added, weight, 1e-5)
        expected_normed, expected_new = reference.add_rms_norm(total, added, weight, 1e-5)
        assert torch.equal(new, expected_new)
        torch.testing.assert_close(normed, expected_normed, rtol=1e-5, atol=1e-6)  # sums of squares in another order
    return True


@pytest.mark.parametrize("size", [2, 4])
def test_reduce_and_norm_in_one_call(ranks, size):
    assert all(ranks(size).run(reduce_and_norm))


def many(group, rounds):
    """Sums, gathers and broadcasts in turn, with ranks that dawdle at random."""
    generator = torch.Generator().manual_seed(group.rank)
    for i in range(rounds):
        if torch.rand(1, generator=generator) < 0.02:
            time.sleep(0.002)
        assert (
            group.all_reduce(torch.full((3,), float(i + group.rank))).tolist()
            == [sum(i + r for r in range(group.size))] * 3
        )
        sent = torch.tensor([i] if group.is_leader else [-1])
        assert group.collectives.broadcast(sent).item() == i
        assert group.collectives.broadcast(sent + group.rank).item() == i
        assert group.all_gather(torch.tensor([i * 10 + group.rank])).tolist() == [
            [i * 10 + r] for r in range(group.size)
        ]
    return True


@pytest.mark.parametrize("size", [2, 4])
def test_thousands_of_collectives_stay_in_step(ranks, size):
    assert all(ranks(size).run(many, 1000))


PEER = """
import sys, time; sys.path.insert(0, {tests!r})
import bare, torch
from euryale.parallel.group import join
group = join(timeout=float(sys.argv[1]), device="cpu")
group.all_reduce(torch.ones(1))
print("ready", flush=True)
if group.rank == 1:
    time.sleep(60)
started = time.monotonic()
try:
    while True:
        group.all_reduce(torch.ones(1))
except RuntimeError as error:
    print(type(error).__name__, error, round(time.monotonic() - started, 1), flush=True)
"""


@pytest.fixture
def three():
    """Three processes that have joined; started with ``begin(timeout)``."""

    started = []

    def begin(timeout: float) -> list[subprocess.Popen]:
        port = free_port()
        for rank in range(3):
            env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-c", PEER.format(tests=str(ROOT / "tests")), str(timeout)]
            started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        assert [p.stdout.readline() for p in started] == ["ready\n"] * 3
        return started

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_waiting_ranks_sleep_and_notice_a_killed_one_at_once_which_leaves_nothing(three):
    before = leftovers()
    peers = three(30)
    time.sleep(0.5)  # the others sleep in a collective by now
    ticks = [_cpu_ticks(p.pid) for p in peers]
    time.sleep(1)
    used = [(_cpu_ticks(p.pid) - first) / os.sysconf("SC_CLK_TCK") for p, first in zip(peers, ticks, strict=True)]
    assert max(used) < 0.2  # seconds of the second; spinning would take all of it
    killed = time.monotonic()
    peers[1].kill()  # it stays a zombie until the end of this test: nobody waits for it
    for peer in (peers[0], peers[2]):
        assert peer.stdout.readline().startswith("RankLost rank 1 is gone")
    assert time.monotonic() - killed < 5  # looked for every 0.05 s; the rest is for a busy machine
    assert leftovers() <= before


def test_a_rank_that_does_not_come_is_given_up(three):
    peers = three(5)  # they also join within this time, each after loading torch
    peers[1].send_signal(signal.SIGSTOP)
    for peer in (peers[0], peers[2]):
        assert "did not join a collective within 5 s" in peer.stdout.readline()


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
