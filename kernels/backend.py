"""Picks an operation's implementation: ``reference`` (plain PyTorch, the oracle), ``cpu`` (C++) or ``triton``."""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

from euryale.kernels import cpu

_forced: str | None = None


def implementation(operation: str, device: torch.device) -> ModuleType:
    """The module of ``euryale.kernels.<operation>`` that runs on ``device``."""
    return _module(operation, _forced or _best(device.type))


def is_compiled(device: torch.device) -> bool:
    """Whether compiled kernels run on ``device``, rather than PyTorch's."""
    return (_forced or _best(device.type)) != "reference"


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Runs the implementation ``name`` on every device, for tests and benchmarks."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@cache
def _best(device_type: str) -> str:
    if device_type == "cpu" and cpu.load() is not None:
        return "cpu"
    return "triton" if device_type == "cuda" and importlib.util.find_spec("triton") else "reference"


@cache
def _module(operation: str, name: str) -> ModuleType:
    return importlib.import_module(f"euryale.kernels.{operation}.{name}")
