"""The benchmarks run and end with a line for machines; what they measure is not asserted."""

import json
import subprocess
import sys

import pytest
from support import ROOT

COMMANDS = {
    "step": ["--model", "demo-6m", "--rows", "1", "3", "--contexts", "40", "--rounds", "1", "--device", "cpu"],
    "kernels": ["--contexts", "40", "--nodes", "3", "--rounds", "1", "--dtype", "bfloat16"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark(name):
    command = [sys.executable, str(ROOT / "tests" / "run_module.py"), f"euryale.benchmarks.{name}", *COMMANDS[name]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    if name == "step":
        row = report["contexts"]["40"]["3"]
        assert row["ms"] > 0
        assert {"products", "attention", "small kernels", "heads", "commit", "host"} == set(row["shares"])
    else:
        assert all(case["us"] > 0 for case in report["cases"].values())


def test_collectives_benchmark():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [
        str(ROOT / "tests" / "run_module.py"),
        "euryale.benchmarks.collectives",
        "--rounds",
        "1",
        "--calls",
        "10",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])["all_reduce"]) == {"2 KiB", "32 KiB", "1 MiB"}
