"""The benchmarks run and end with one JSON line; times are not asserted."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from support import ROOT, run_script

from euryale.benchmarks.kernels import operations as kernels
from euryale.runtime import step_profiler as profile

COMMANDS = {
    "kernels.step": ["--model", "demo-6m", "--rows", "1", "3", "--contexts", "40", "--rounds", "1", "--device", "cpu"],
    "kernels.loop": [
        "--model",
        "demo-6m",
        "--rows",
        "3",
        "--max-len",
        "64",
        "--steps",
        "3",
        "--rounds",
        "1",
        "--device",
        "cpu",
    ],
    "contention": ["--model", str(ROOT / "demo" / "model"), "--rounds", "1", "--tokens", "4"],
    "kernels.quantization": [
        "--model",
        str(ROOT / "demo" / "model"),
        "--windows",
        "1",
        "--prompts",
        "1",
        "--max-tokens",
        "4",
    ],
}
BAD = {
    "kernels.step": [["--rows", "1000"], ["--contexts", "-5"], ["--quantization", "fp8", "--device", "cpu"]],
    "kernels.loop": [["--rows", "0"], ["--max-len", "20"]],
    "kernels.operations": [["--heads", "3", "2"], ["--rounds", "0"]],
    "kernels.gpu": [[]],
    "contention": [["--model", "nowhere"], ["--model", "demo-6m", "--core", "99999"], ["--rounds", "1"]],
}


def short_profiles() -> None:
    """Profile the cost of steps for one request only."""
    profile._REQUESTS = (1,)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark(name):
    done = run_script(f"euryale.benchmarks.{name}", *COMMANDS[name], before=short_profiles)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    if name == "kernels.step":
        row = report["contexts"]["40"]["3"]
        assert row["ms"] > 0
        assert {"products", "attention", "small kernels", "heads", "commit", "host"} == set(row["fractions"])
    elif name == "kernels.loop":
        assert all(row["ms"] > 0 for row in report["loops"].values())
    elif name == "contention":
        speeds = {name: row["median"] for name, row in report["tokens_per_second"].items()}
        # Both are rounded to two digits after the point.
        assert report["ratio"] == pytest.approx(speeds["disturbed"] / speeds["undisturbed"], rel=0.05)
    else:
        assert report["variants"]["int8"]["loss"] == pytest.approx(report["variants"]["none"]["loss"], abs=0.1)


def test_the_benchmark_of_kernels(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "CACHES", 1)  # times are not asserted, so the caches need not be exceeded
    arguments = ["--contexts", "40", "--rows", "3", "--rounds", "1", "--dtype", "bfloat16"]
    kernels.main(kernels.parser_of_arguments().parse_args(arguments))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(case["us"] > 0 for case in report["cases"].values())


@pytest.mark.parametrize(("name", "arguments"), [(name, bad) for name, all_bad in BAD.items() for bad in all_bad])
def test_bad_arguments_end_in_one_line(name, arguments, monkeypatch, capsys):
    if name == "kernels.gpu" and torch.cuda.is_available():
        pytest.skip("the benchmark would run")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.delitem(sys.modules, f"euryale.benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"euryale.benchmarks.{name}", run_name="__main__")
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_every_benchmark_can_be_imported(tmp_path):
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "benchmarks").rglob("*.py")]
    # These two run in a peer's environment.
    names = [name for name in names if not name.endswith(("peer_worker", "gguf_file"))]
    code = "\n".join(f"import euryale.{name}" for name in names)
    (tmp_path / "imports.py").write_text(code)
    run_script(tmp_path / "imports.py").check_returncode()


def test_collectives_benchmark():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [
        str(ROOT / "tests" / "run_module.py"),
        "euryale.benchmarks.kernels.collectives",
        "--rounds",
        "1",
        "--calls",
        "10",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])["all_reduce"]) == {"2 KiB", "32 KiB", "1 MiB"}
