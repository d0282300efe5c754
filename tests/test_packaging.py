"""A wheel holds everything; a bare checkout runs without being installed."""

import shutil
import subprocess
import sys
import zipfile

from support import ROOT


def test_a_wheel_imports_away_from_the_checkout(tmp_path):
    source = tmp_path / "source"  # a copy, so that the build leaves nothing in the checkout
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.split():
        is_code = name.endswith((".py", ".toml", ".md", ".cpp", ".h", ".def", "LICENSE"))
        if name.startswith("src/") or (is_code and not name.startswith(("tests/", "demo/"))):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target, follow_symlinks=False)
    settings = source / "pyproject.toml"  # slow kernels are whole too, and compiled five times as fast
    settings.write_text(settings.read_text().replace('"-O3"', '"-O0"'))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["-w", str(tmp_path / "wheels"), str(source)]
    subprocess.run(command, check=True, timeout=110)
    (wheel,) = (tmp_path / "wheels").glob("euryale-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import euryale.client, euryale.kernels.accept, euryale.launch.serve, euryale.runtime.engine as e; "
    code += "from euryale.kernels import cpu; assert cpu.library(); print(e.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path / "site")},
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))


def test_a_bare_checkout_runs_without_installation():
    """With the editable installation taken out, the entry points find their package themselves."""
    code = (
        f"import runpy, sys; sys.path = [p for p in sys.path if p != {str(ROOT / 'src')!r}]; "
        f"sys.argv = ['serve.py', '--help']; runpy.run_path({str(ROOT / 'launch' / 'serve.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "--max-num-batched-tokens" in done.stdout
    assert "--bind" in done.stdout
