"""Fixtures of all tests. Importing ``support`` lets the tests run from a bare checkout."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Profiles of step times are stored for this run of the tests only, so that each model is profiled once.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tests-of-euryale-")

import pytest
import torch
from hypothesis import settings
from support import Ranks

from euryale.parallel.group import single

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
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
