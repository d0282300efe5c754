"""The C++ under the compilers' sanitizers: wrong addresses, undefined behaviour, races."""

import os
import shutil
import subprocess
import sys

import pytest
from support import ROOT

CXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(CXX is None, reason="there is no g++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fopenmp", "-fno-math-errno"]
SOURCES = [str(p) for p in sorted([*ROOT.glob("kernels/*/*.cpp"), *ROOT.glob("parallel/*.cpp")])]
# The editable installation is taken out, so that the copy is what is imported.
RUN = """
import sys
sys.meta_path = [f for f in sys.meta_path if '__editable__' not in repr(f)]
import pytest, support
from euryale.kernels import cpu
assert cpu.__file__.startswith({copy!r}), cpu.__file__
sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', 'tests/kernels', '-k', 'not reference and not triton']))
"""


def compile(*arguments: str) -> None:
    subprocess.run([CXX, *FLAGS, *arguments], check=True, timeout=200)


@pytest.mark.timeout(400)
def test_kernels_under_the_address_and_undefined_behaviour_sanitizers(tmp_path):
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py", "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in files.stdout.split():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
    sanitize = "-fsanitize=address,undefined"
    library = str(tmp_path / "kernels" / "cpu" / "_native.so")
    compile("-fPIC", "-shared", sanitize, "-fno-sanitize-recover=undefined", *SOURCES, "-o", library)
    runtimes = [
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    env = os.environ | {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(tmp_path / "tests")
    command = [sys.executable, "-c", RUN.format(copy=str(tmp_path))]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)
def test_collectives_under_the_thread_sanitizer(tmp_path):
    program = str(tmp_path / "threads_as_ranks")
    compile("-pthread", "-fsanitize=thread", str(ROOT / "tests/parallel/threads_as_ranks.cpp"), *SOURCES, "-o", program)
    done = subprocess.run([program], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
