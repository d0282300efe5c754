"""This machine in words and numbers, measured in the same run as what is compared with them."""

import platform
import time
from pathlib import Path

import torch

from euryale.kernels import cpu

_READ = 256 << 20  # bytes: more than a last-level cache


def describe() -> str:
    """Processor, torch and the kernels' instruction set."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = f"{len(names)} x {names[0]}" if names else model
    if torch.cuda.is_available():
        model += f", {torch.cuda.get_device_name()}"
    return f"{model}, torch {torch.__version__}, CPU kernels {cpu.instruction_set()}"


def best(function, rounds: int = 5) -> float:
    """Seconds of the quickest of some calls: what the machine can do, when it is let."""
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return min(found)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second at which memory is read (CPU: summed, all threads of the process) or copied (GPU: both ways)."""
    if device.type == "cpu":
        x = torch.ones(_READ // 4)
        return _READ / best(x.sum)
    x = torch.ones(_READ, device=device)
    y = torch.empty_like(x)

    def copy() -> None:
        y.copy_(x)
        torch.cuda.synchronize()

    return 2 * x.nbytes / best(copy)
