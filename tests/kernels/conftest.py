"""Fixtures of the kernels' tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that a kernel leaves unwritten shows."""
    fill = lambda x: x.fill_(torch.nan) if x.is_floating_point() else x  # noqa: E731
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))
