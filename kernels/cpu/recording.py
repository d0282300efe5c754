"""Calls of the CPU kernels noted while a step runs, to be repeated without Python."""

import ctypes
import struct
from collections.abc import Callable
from typing import Any


class RecordedCalls:
    """Calls with their arguments, as ``replay`` of replay.cpp reads them.

    ``names``: the function of each call. ``kept``: objects that must live as long, because the calls use their memory.
    """

    def __init__(self) -> None:
        self._words: list[int] = []
        self.names: list[str] = []
        self.kept: list[object] = []

    def noting(self, name: str, replay: int | None, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, noted whenever it is called. ``replay``: the address of what repeats it; None if nothing can,
        then a call raises RuntimeError."""

        def call(*arguments: Any) -> Any:
            if replay is None:
                raise RuntimeError(f"{name} cannot be part of a recorded step")
            self._words += [replay, len(arguments), *map(_word, arguments)]
            self.names.append(name)
            self.kept += [a for a in arguments if not isinstance(a, int | float | None)]
            return function(*arguments)

        return call

    def words(self) -> "ctypes.Array[ctypes.c_int64]":
        """The calls noted so far: for each the address that repeats it, the number of arguments, and the arguments."""
        return (ctypes.c_int64 * len(self._words))(*self._words)


def _word(argument: Any) -> int:
    """An argument as 64 bits: an integer, a float32's bits, or an address (None: 0)."""
    if argument is None:
        return 0
    if isinstance(argument, float):
        return struct.unpack("<i", struct.pack("<f", argument))[0]
    if isinstance(argument, int):
        return argument
    return ctypes.addressof(argument.contents)  # a pointer to a structure
