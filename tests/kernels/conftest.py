"""Fixtures of the kernels' tests."""

import pytest
import torch

from euryale.kernels import backend, cpu

INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "baseline")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that a kernel leaves unwritten shows."""

    def poison(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(torch.nan if x.is_floating_point() else 77)

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, inner=inner, **k: poison(inner(*a, **k)))


@pytest.fixture(params=["reference", *INSTRUCTION_SETS])
def each_implementation(request):
    """Runs the test on one implementation of the kernels."""
    if request.param == "reference":
        with backend.forced("reference"):
            yield
        return
    assert cpu.load() is not None, "the CPU kernels are not built: pip install -e ."
    best = cpu.instruction_set()
    if not cpu.use(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    with backend.forced("cpu"):
        yield
    cpu.use(best)
