"""Runs groups for the tests: torchrun starts them, clients use them over sockets, and no process or file is left."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
from support import ROOT

from euryale.client import Client


@contextmanager
def served(model, size: int = 2, *flags: str, nodes: tuple[str, ...] = ()):
    """A running group: yields (torchrun's process, address). Afterwards no process and no file may be left. ``nodes``:
    torchrun's flags for a group of several nodes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), *nodes]
    command += [str(ROOT / "launch" / "serve.py"), "--model", str(model[0]), "--medusa", str(model[0] / "medusa")]
    command += ["--dtype", "float32", "--bind", "tcp://127.0.0.1:0", "--max-num-seqs", "8", "--tree", "static", *flags]
    temporary = tempfile.mkdtemp(
        prefix="served-"
    )  # its sockets' directory, as other groups may start and end meanwhile
    before, environment = leftovers(), os.environ | {"TMPDIR": temporary}
    group = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", env=environment
    )
    noise: list[str] = []
    reader = threading.Thread(target=lambda: noise.extend(group.stderr), daemon=True)
    reader.start()
    family: list[psutil.Process] = []
    try:
        address = next((line.split()[1] for line in group.stdout if line.startswith("ready ")), None)
        assert address, "".join(noise)
        family = psutil.Process(group.pid).children(recursive=True)
        yield group, address
    finally:
        if group.poll() is None:
            group.send_signal(signal.SIGTERM)
        try:
            group.wait(30)
        finally:
            _, alive = psutil.wait_procs(family, timeout=10)
            for process in alive:
                process.kill()
    assert not alive, f"processes were left: {alive}"
    assert leftovers() <= before, "shared memory was left"
    left = [path.name for path in Path(temporary).glob("euryale-*")]
    shutil.rmtree(temporary)
    assert not left, f"files were left: {left}"


def leftovers() -> set[str]:
    """Shared-memory segments on this machine, without what other programs' OpenMP makes."""
    others = ("sem.", "__KMP_REGISTERED_LIB")
    return {name for name in os.listdir("/dev/shm") if not name.startswith(others)}


def wait_until_idle(client: Client, num_cancelled: int = 0) -> dict:
    """Return the server's stats once it is idle and ``num_cancelled`` requests were cancelled.

    The server may notice late that a client left. All pages must be free then.
    """
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        stats = client.stats()
        is_idle = not stats["requests_running"] and not stats["requests_waiting"]
        if is_idle and stats["engine_cancelled"] >= num_cancelled:
            break
        time.sleep(0.1)
    assert stats["pages_free"] == stats["pages_total"]
    return stats
