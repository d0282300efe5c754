"""The house rules, as tests: who may import whom, sizes, packaging, what must not appear in the code."""

import ast
import os
import re
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
    "training": {"runtime", "frontend", "scheduler", "parallel", "kernels", "client"},
    "benchmarks": set(PACKAGES),
    "launch": set(PACKAGES),
}
MAX_FILE, MAX_FUNCTION, MAX_TEST_FILE = 300, 60, 400

SOURCES = [p for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py"))]
NATIVE = [p for name in PACKAGES for ending in ("cpp", "h", "def") for p in sorted((ROOT / name).rglob(f"*.{ending}"))]
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


LISTS = (ROOT / "kernels" / "cpu" / "operations.def", ROOT / "parallel" / "collectives.def")
LISTED = re.compile(r"EURYALE_(?:VECTORISED|PLAIN)\(\w+, [^,]+, (\w+), \(([^()]*)\)\)")


def plain(path) -> str:
    """The text of a C++ file without comments, line breaks and our namespace."""
    return " ".join(re.sub(r"//.*|\beuryale::", "", path.read_text()).split())


def types(parameters: str) -> list[str]:
    """The types of declared parameters, without their names; of a call's arguments, something else."""
    return [re.sub(r" ?\b\w+$", "", parameter.strip()) for parameter in parameters.split(",")]


@pytest.mark.parametrize(("source", "name", "parameters"), [(p, *f) for p in LISTS for f in LISTED.findall(plain(p))])
def test_the_signature_of_a_native_function_is_written_once(source, name, parameters):
    """Once in its list; the only other place is its definition, which a compiler holds against the list."""
    texts = {name_of(p): plain(p) for p in NATIVE}
    found = [
        where
        for where, text in texts.items()
        for others in re.findall(rf"\b(?:euryale_)?{name}(?:, )?\(([^()]*)\)", text)
        if types(others) == types(parameters)
    ]
    definition = [where for where in found if where != name_of(source)]
    assert len(found) == 2, f"{name} is declared in {found}"
    assert len(definition) == 1


def test_only_one_python_file_turns_declarations_into_ctypes():
    users = {name_of(p) for p in SOURCES if re.search(r"argtypes|CFUNCTYPE", p.read_text())}
    assert users == {"kernels/cpu/native.py", "scheduler/speculation/tree_builder.py"}


@pytest.mark.parametrize("folder", sorted({p.parent for p in SOURCES if p.name == "cpu.py"}), ids=name_of)
def test_a_cpu_operation_is_known_to_its_folder_and_two_files(folder):
    """So that a new one touches eight at most: five in its folder, these two, and its test (CONTRIBUTING.md)."""
    shared = [*(ROOT / "kernels" / "cpu").iterdir(), *(ROOT / "kernels").glob("*.py"), ROOT / "pyproject.toml"]
    known_to = {
        name_of(p)
        for p in shared
        if p.suffix in (".py", ".cpp", ".h", ".def", ".toml") and re.search(rf"\b{folder.name}\b", p.read_text())
    }
    assert known_to == {"kernels/cpu/operations.def", "pyproject.toml"}


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
    modules = ("scheduler.scheduler", "client", "frontend.frontend", "frontend.process")
    code = f"import sys, {', '.join(f'euryale.{m}' for m in modules)}; assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)
