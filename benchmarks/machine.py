"""Description and measured bandwidth of this machine, for comparison within one run."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from euryale.kernels import cpu

_READ = 256 << 20  # bytes, more than a last-level cache


def describe() -> str:
    """Return the processor, the torch version and the instruction set of the CPU kernels."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = f"{len(names)} x {names[0]}" if names else model
    if torch.cuda.is_available():
        model += f", {torch.cuda.get_device_name()}"
    return f"{model}, torch {torch.__version__}, CPU kernels {cpu.instruction_set()}"


def best(function: Callable[[], object], rounds: int = 5) -> float:
    """Return the seconds of the fastest of ``rounds`` calls, the least disturbed one."""
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return min(found)


def read_bandwidth(device: torch.device) -> float:
    """Return bytes per second: of reads by all threads on a CPU, of copies (both directions) on a GPU."""
    if device.type == "cpu":
        x = torch.ones(_READ // 4)
        return _READ / best(x.sum)
    x = torch.ones(_READ, device=device)
    y = torch.empty_like(x)

    def copy() -> None:
        y.copy_(x)
        torch.cuda.synchronize()

    return 2 * x.nbytes / best(copy)
