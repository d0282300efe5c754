"""The house rules, as tests: who may import whom, sizes, packaging, what must not appear in the code."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support import ROOT

PACKAGES = ("benchmarks", "client", "frontend", "kernels", "launch", "parallel", "runtime", "scheduler", "training")
MAY_IMPORT = {
    "client": set(),
    "kernels": set(),
    "parallel": {"kernels"},
    "scheduler": {"client"},
    "frontend": {"client", "scheduler"},
    "runtime": {"frontend", "scheduler", "parallel", "kernels", "client"},
    "training": {"runtime", "frontend", "scheduler", "parallel", "kernels"},
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
        if package in ("scheduler", "client", "frontend"):
            assert parts[0] != "torch", f"{package} must work without torch"
        if package in ("scheduler", "client"):
            assert parts[0] != "transformers", f"{package} must work without transformers"
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


def test_every_package_is_linked_and_every_folder_is_one():
    """A package without its link, or a folder without ``__init__.py``, would vanish from the wheel without a word."""
    links = {p.name: p for p in (ROOT / "src" / "euryale").iterdir() if p.is_symlink()}
    assert sorted(links) == sorted(PACKAGES)
    for name, link in links.items():
        assert link.readlink() == Path("../..") / name
    for folder in {p.parent for p in SOURCES}:
        assert (folder / "__init__.py").is_file(), f"{folder} has no __init__.py"


def test_only_the_parallel_package_mentions_ranks():
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] in ("parallel", "benchmarks"):
            continue
        attributes = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert "rank" not in attributes, f"{name_of(path)} asks for a rank"


def test_scheduler_client_and_front_end_run_without_torch():
    modules = ("scheduler.scheduler", "client", "frontend.frontend")
    code = f"import sys, {', '.join(f'euryale.{m}' for m in modules)}; assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)
