"""The house rules, as tests: who may import whom, sizes, packaging, what must not appear in the code."""

import ast
import subprocess
import sys
import tomllib

import pytest
from support import ROOT

PACKAGES = ("benchmarks", "client", "kernels", "launch", "parallel", "runtime", "scheduler", "training")
MAY_IMPORT = {
    "client": set(),
    "kernels": set(),
    "parallel": {"kernels"},
    "scheduler": {"client"},
    "runtime": {"scheduler", "parallel", "kernels", "client"},
    "training": {"runtime", "scheduler", "parallel", "kernels"},
    "benchmarks": set(PACKAGES),
    "launch": set(PACKAGES),
}
MAX_FILE, MAX_FUNCTION, MAX_TEST_FILE = 300, 60, 400

SOURCES = [p for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py"))]
NATIVE = [p for name in PACKAGES for ending in ("cpp", "h") for p in sorted((ROOT / name).rglob(f"*.{ending}"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path) -> str:
    return str(path.relative_to(ROOT))


def imports(path) -> set[str]:
    """Dotted names of everything a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_follow_the_architecture(path):
    package = path.relative_to(ROOT).parts[0]
    for imported in imports(path):
        parts = imported.split(".")
        if parts[0] == "euryale":
            assert parts[1] == package or parts[1] in MAY_IMPORT[package], f"{package} may not import {imported}"
        if package in ("scheduler", "client"):
            assert parts[0] not in ("torch", "transformers"), f"{package} must work without {parts[0]}"
        if package == "client":
            assert parts[0] != "numpy", "the client must work without numpy"
        if package not in ("parallel",):
            assert not imported.startswith("torch.distributed"), "only parallel talks to other ranks"
        assert parts[0] != "pickle", "nothing is ever unpickled"


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name_of)
def test_files_and_functions_stay_small(path):
    limit = MAX_TEST_FILE if path.is_relative_to(ROOT / "tests") else MAX_FILE
    text = path.read_text()
    assert len(text.splitlines()) <= limit, "split this file by its nouns"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION, f"{node.name} is too long: split it"


@pytest.mark.parametrize("path", NATIVE, ids=name_of)
def test_native_files_stay_small_and_are_built(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE, "split this file by its nouns"
    assert max(map(len, lines)) <= 120
    extensions = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    built = {name for extension in extensions for name in extension["sources"] + extension["depends"]}
    assert name_of(path) in built, "a forgotten file would not be in the package"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_file_says_what_it_does(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "a module docstring is missing"


def test_the_package_list_is_the_folders_that_exist():
    """A forgotten sub-package would vanish from the wheel without a word."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent.relative_to(ROOT) for p in SOURCES}
    assert sorted(setuptools["packages"]) == sorted("euryale." + ".".join(f.parts) for f in folders)
    for folder in folders:
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder} has no __init__.py"
    top = {f"euryale.{name}": name for name in PACKAGES}
    assert setuptools["package-dir"] == top


def test_only_the_parallel_package_mentions_ranks():
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] in ("parallel", "benchmarks"):
            continue
        attributes = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert "rank" not in attributes, f"{name_of(path)} asks for a rank"


def test_scheduler_and_client_run_without_torch():
    code = "import support, sys, euryale.scheduler.frontend, euryale.scheduler.scheduler, euryale.client"
    guard = (ROOT / "tests" / "conftest.py").parent
    script = (
        f"import sys, types; sys.path.insert(0, {str(guard)!r}); m = types.ModuleType('euryale'); "
        f"m.__path__ = [{str(ROOT)!r}]; sys.modules['euryale'] = m; "
        f"{code.replace('support, ', '')}; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
