"""Two nodes: two torchrun agents joined by a static rendezvous, here on one machine."""

import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest
from serving import served, wait_until_idle
from support import ROOT, free_port, oracle_greedy, prompts

from euryale.client import Client, GroupLost, ServerLost

FLAGS = ("--tree", "static")


@contextmanager
def two_nodes(model, ranks_per_node: int, flags: tuple[str, ...] = FLAGS):
    """A group over two agents, the second with these ``flags``: yields (first agent, second agent, address)."""
    port = str(free_port())

    def rendezvous(rank: int) -> tuple[str, ...]:
        return ("--nnodes", "2", "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", port)

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks_per_node), *rendezvous(1)]
    command += [str(ROOT / "launch" / "serve.py"), "--model", str(model[0]), "--medusa", str(model[0] / "medusa")]
    command += ["--dtype", "float32", "--max-num-seqs", "8", *flags]
    second = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
    try:
        with served(model, ranks_per_node, nodes=rendezvous(0)) as (first, address):
            family = psutil.Process(second.pid).children(recursive=True)
            yield first, second, address
    finally:
        if second.poll() is None:
            second.send_signal(signal.SIGTERM)
        second.wait(30)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, f"processes were left: {alive}"


def test_two_nodes_serve_and_drain(model):
    with two_nodes(model, 2) as (first, second, address), Client(address) as client:
        assert client.hello().tensor_parallel_size == 4
        asked = [p % 290 + 3 for p in prompts(3)]
        running = [client.generate(prompt_tokens=p.tolist(), max_tokens=12, ignore_eos=True) for p in asked]
        for prompt, generation in zip(asked, running, strict=True):
            assert list(generation.result().tokens) == oracle_greedy(model[1], prompt, 12)
        wait_until_idle(client)
        client.drain()
        assert first.wait(60) == 0
        assert second.wait(60) == 0


def test_nodes_that_were_started_differently_are_refused(model):
    said = "error: the ranks were started with different settings: --max-tree-nodes is 64 on rank 0"
    others = (*FLAGS, "--max-tree-nodes", "8")
    with pytest.raises(AssertionError, match=said), two_nodes(model, 1, others):
        pass


def test_a_lost_node_ends_the_group(model):
    """The second node's agent is killed: its workers die with it, and the first node notices and ends."""
    with two_nodes(model, 1) as (first, second, address), Client(address) as client:
        answer = iter(client.generate(prompt_tokens=[5, 6, 7], max_tokens=200, ignore_eos=True))
        next(answer)
        killed = time.monotonic()
        second.kill()
        with pytest.raises((GroupLost, ServerLost)):
            list(answer)
        assert time.monotonic() - killed < 60  # generous: it is noticed when a socket closes, not by a timeout
        assert first.wait(60) != 0
