"""The Triton kernels (triton_cases.py), in a process of their own: Triton's interpreter has to be chosen before triton
is imported, and the other tests of this process may have imported it."""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

# Whole steps take as long as all kernels by themselves; both halves have a core where there are two.
STEPS = "padded or outgrows"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.timeout(600)  # compiling for a GPU takes its time
def test_triton_kernels():
    cases = Path(__file__).with_name("triton_cases.py")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--timeout=300", str(cases), "-k"]

    def run(chosen: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, chosen], env=environment, capture_output=True, text=True, timeout=580)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, (STEPS, f"not ({STEPS})")):
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
            assert " passed" in done.stdout
