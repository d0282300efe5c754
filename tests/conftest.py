"""Fixtures of all tests. Importing ``support`` lets the tests run from a bare checkout."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from support import Ranks

from euryale.parallel.group import single

settings.register_profile("nightly", max_examples=2000)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """The models are tiny: threads would only wait for each other."""
    torch.set_num_threads(1)


class _Single:
    """The same interface as Ranks for a group of one, in this process."""

    def run(self, function, *args) -> list:
        return [function(single(), *args)]


@pytest.fixture(scope="session")
def ranks():
    """``ranks(n)``: a group of n real ranks, started once and kept."""
    pools = {1: _Single()}

    def get(size: int):
        if size not in pools:
            pools[size] = Ranks(size)
        return pools[size]

    yield get
    for pool in pools.values():
        if isinstance(pool, Ranks):
            pool.close()
