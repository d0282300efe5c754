"""The compiled library as ctypes functions and structures, made from what the library says of itself.

Its tables hold the declarations of the lists in C++ (operations.def beside this file, parallel/collectives.def), so
that no signature is written in Python.
"""

import ctypes
import re
from collections.abc import Callable, Iterator, Mapping
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

from euryale.kernels.cpu.recording import RecordedCalls

_TYPES: dict[str, Any] = {"void": None, "int": c_int, "int64_t": c_int64, "float": c_float}
_FUNCTION = re.compile(r"(?P<result>.+) (?P<name>\w+)\((?P<parameters>.*)\)")
_STRUCTURE = re.compile(r"struct (?P<name>\w+) {(?P<fields>.*)}")
_ENTRY = re.compile(r"^EURYALE_(STRUCTURE|VECTORISED|PLAIN)\((.*?)\)$", re.MULTILINE | re.DOTALL)


class _Entry(ctypes.Structure):
    """``Entry`` of function_table.h."""

    _fields_ = (("declaration", c_char_p), ("address", c_void_p), ("replay", c_void_p))


class Library:
    """The library's functions as attributes, called with numbers and addresses.

    While a recording is active, it notes the calls that it can repeat; all others raise RuntimeError.
    """

    def __init__(self, path: Path) -> None:
        """Load the file at ``path`` and the functions of operations.def. OSError if it does not load or was built
        from other sources."""
        self.recording: RecordedCalls | None = None
        self._native = ctypes.CDLL(str(path))
        self._functions: dict[str, tuple[Callable[..., Any], int | None]] = {}  # with the address that replays it
        self._structures: dict[str, type[ctypes.Structure]] = {}
        self.add("euryale_operations", Path(__file__).with_name("operations.def"))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Functions are set as attributes: this runs only for names that no list has."""
        raise AttributeError(f"the CPU library has no function {name}")

    def add(self, table: str, source: Path) -> None:
        """Make the functions and structures of the exported ``table`` available. OSError if there is none, or if it
        differs from its list ``source``; an installation without sources has nothing to differ from."""
        entries = self._entries(table)
        if source.is_file():
            _compare([declaration for declaration, _, _ in entries], _declarations(source.read_text()), source.name)
        for declaration, address, replay in entries:
            if found := _STRUCTURE.fullmatch(declaration):
                self._structures[found["name"]] = _structure(found["name"], found["fields"])
            elif found := _FUNCTION.fullmatch(declaration):
                function = _prototype(found["result"], found["parameters"])(address)
                self._functions[found["name"]] = function, replay
                setattr(self, found["name"], function)

    def structure(self, name: str, values: Mapping[str, float]) -> "ctypes._Pointer[ctypes.Structure]":
        """A pointer to a new structure ``name`` with ``values``, pointers as addresses. KeyError if a field has no
        value."""
        kind = self._structures[name]
        return ctypes.pointer(kind(*(values[field[0]] for field in kind._fields_)))

    def record(self, recording: RecordedCalls | None) -> None:
        """Start noting calls in ``recording``, or stop with None."""
        self.recording = recording
        for name, (function, replay) in self._functions.items():
            setattr(self, name, function if recording is None else recording.noting(name, replay, function))

    def _entries(self, table: str) -> list[tuple[str, int, int | None]]:
        try:
            exported = getattr(self._native, table)
        except AttributeError as error:
            raise OSError(f"the library has no {table}") from error
        exported.argtypes, exported.restype = [c_int64], POINTER(_Entry)
        entries = exported(ctypes.sizeof(_Entry))
        if not entries:
            raise OSError(f"entries of the library's {table} have another size")
        return [(entry.declaration.decode(), entry.address, entry.replay) for entry in _until_null(entries)]


def _until_null(entries: "ctypes._Pointer[_Entry]") -> Iterator[_Entry]:
    index = 0
    while entries[index].declaration is not None:
        yield entries[index]
        index += 1


def _declarations(text: str) -> list[str]:
    """The entries of a list's ``text``, spelled as the C++ preprocessor spells them in the library."""
    spelled = []
    for kind, arguments in _ENTRY.findall(re.sub(r"[ \t]*//.*", "", text)):
        words = " ".join(arguments.split())
        if kind == "STRUCTURE":
            name, fields = words.split(", ", 1)
            spelled.append(f"struct {name} {{{fields}}}")
        else:
            _, result, name, parameters = words.split(", ", 3)
            spelled.append(f"{result} {name}({parameters.strip('( )')})")
    return spelled


def _compare(built: list[str], listed: list[str], source: str) -> None:
    """OSError that names the first declaration in which the library and its list differ."""
    if different := [text for text in listed if text not in built] or [text for text in built if text not in listed]:
        raise OSError(f"the library was built from another {source}, which differs in '{different[0]}'")


def _type_of(declaration: str) -> Any:
    """The ctypes type of a field or parameter such as ``const void* x``: pointers are addresses."""
    return c_void_p if "*" in declaration else _TYPES[declaration.split()[0]]


def _prototype(result: str, parameters: str) -> Any:
    """A ctypes function type. Its functions release the interpreter's lock while they run."""
    returned = c_char_p if result == "const char*" else c_void_p if "*" in result else _TYPES[result]
    return ctypes.CFUNCTYPE(returned, *(_type_of(parameter) for parameter in parameters.split(",") if parameter))


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    declarations = [text.strip() for text in fields.split(";") if text.strip()]
    described = [(text.split()[-1], _type_of(text)) for text in declarations]
    return type(name, (ctypes.Structure,), {"_fields_": described})
