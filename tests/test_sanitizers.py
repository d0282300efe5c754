"""The C++ under the compilers' sanitizers: wrong addresses, undefined behaviour, races."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import ROOT

CXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(CXX is None, reason="there is no g++")
# Without optimization, which takes a third of the time to compile and drops no wrong access before it is checked.
FLAGS = ["-std=c++17", "-O0", "-g1", "-pthread", "-fno-math-errno"]
SOURCES = [str(p) for p in sorted([*ROOT.glob("kernels/*/*.cpp"), *ROOT.glob("parallel/*.cpp")])]
# The copy comes before an editable installation on the path.
RUN = """
import sys
import pytest, support
from euryale.kernels import cpu
assert cpu.__file__.startswith({copy!r}), cpu.__file__
chosen = 'not reference and not triton and ' + sys.argv[1]
sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', 'tests/kernels', '-k', chosen]))
"""


def build(folder: Path, output: str, *flags: str, more: tuple[str, ...] = ()) -> None:
    """Compile all sources and ``more``, two at a time, and link them."""

    def compile(numbered: tuple[int, str]) -> str:
        number, source = numbered
        target = str(folder / f"{number}.o")
        subprocess.run([CXX, *FLAGS, *flags, "-c", source, "-o", target], check=True, timeout=200)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, enumerate([*SOURCES, *more])))
    subprocess.run([CXX, *FLAGS, *flags, *objects, "-o", output], check=True, timeout=100)


@pytest.mark.timeout(400)
def test_kernels_under_the_address_and_undefined_behaviour_sanitizers(tmp_path):
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py", "*.def", "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in files.stdout.split():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "src", tmp_path / "src", symlinks=True)
    sanitize = "-fsanitize=address,undefined"
    library = str(tmp_path / "kernels" / "cpu" / "_native.so")
    build(tmp_path, library, "-fPIC", "-shared", sanitize, "-fno-sanitize-recover=undefined")
    runtimes = [
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    env = os.environ | {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "src"), str(tmp_path / "tests")])
    command = [sys.executable, "-c", RUN.format(copy=str(tmp_path))]

    def run(chosen: str) -> subprocess.CompletedProcess:
        where = {"cwd": tmp_path, "env": env}
        return subprocess.run([*command, chosen], **where, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, ("avx512", "not avx512")):
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)
def test_collectives_under_the_thread_sanitizer(tmp_path):
    program = str(tmp_path / "threads_as_ranks")
    ranks = str(ROOT / "tests/parallel/threads_as_ranks.cpp")
    build(tmp_path, program, "-fsanitize=thread", more=(ranks,))
    done = subprocess.run([program], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
