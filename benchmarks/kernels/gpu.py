"""All tests and benchmarks for a single GPU, in under nine minutes.

``python -m euryale.benchmarks.kernels.gpu --out DIR`` runs the compiled kernels' tests, token identity, the benchmarks
of kernels and steps, and both engine loops. Each runs in its own process with its own time limit and writes its output
to DIR. A failure or timeout is reported and does not stop the others.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Section:
    """One command and its limit in ``seconds``."""

    name: str
    seconds: int
    command: list[str]


def benchmark(name: str, *arguments: str) -> list[str]:
    """Return the command of a benchmark."""
    return [sys.executable, "-m", f"euryale.benchmarks.{name}", *arguments]


def tests(*arguments: str) -> list[str]:
    """Return the command of tests."""
    return [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--timeout=300", *arguments]


def sections() -> list[Section]:
    """Return the sections, most important first."""
    contexts, rows = ("--contexts", "128", "1000", "4000", "16000"), ("--rows", "1", "4", "16", "64")
    grouped, whole = ("--heads", "32", "8", "--head-dim", "128"), ("--heads", "32", "32", "--head-dim", "128")
    model = str(ROOT / "demo" / "model")
    step = ("--rows", "1", "8", "16", "32", "64", "128", "--contexts", "256", "4096")
    cases = str(ROOT / "tests" / "kernels" / "triton_cases.py")
    found = [
        Section("tests", 180, tests(cases)),
        Section("step-7b", 60, benchmark("kernels.step", "--model", "llama-7b", *step)),
        Section("loop-7b", 40, benchmark("kernels.loop", "--model", "llama-7b", "--rows", "64")),
        Section(
            "kernels-gqa",
            70,
            benchmark("kernels.operations", "--dtype", "bfloat16", "--flex", *grouped, *contexts, *rows),
        ),
        Section("kernels-mha", 40, benchmark("kernels.operations", "--dtype", "bfloat16", *whole, *contexts, *rows)),
        Section("step-8b-gqa", 35, benchmark("kernels.step", "--model", "llama-8b-gqa", "--rows", "1", "16", "64")),
        Section("identity", 45, benchmark("compare.identity", "--model", model, "--sizes", "1", "--max-num-seqs", "4")),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        command = tests(cases, "-k", "commit or accept or sample or (head_groups and heads1)")
        found.append(Section("sanitizer", 50, [sanitizer, "--error-exitcode", "9", *command]))
    return found


def run(section: Section, out: Path) -> str:
    """Run the section with its output in a file of its name; returns its result."""
    log, started = out / f"{section.name}.txt", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(section.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(section.seconds)
            result = "passed" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its child processes too, which would disturb the next section
            process.wait()
            result = f"stopped after {section.seconds} s"
    return f"{result}, {time.monotonic() - started:.0f} s: {log}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(
            2, "error: torch finds no GPU; benchmarks.kernels.operations and benchmarks.kernels.step run on CPUs too\n"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    ends = {}
    for section in sections():
        ends[section.name] = run(section, args.out)
        print(f"{section.name:<14}{ends[section.name]}", flush=True)
    if "sanitizer" not in ends:
        print("sanitizer     not run: compute-sanitizer is not on the PATH")
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "sections": ends}))


if __name__ == "__main__":
    main()
