"""The compiled CPU kernels: the library, found and described for ctypes.

It is plain C++ without a word of PyTorch's or Python's headers, so that a compiler is all its build needs; calls
hand over addresses. Without it (no compiler at install time, or a checkout nobody built) everything runs on the
reference kernels, and a warning says so.
"""

import ctypes
import logging
import struct
import sysconfig
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("euryale.kernels")

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # is_bfloat16


class Step(ctypes.Structure):
    """``Step`` of ops.h."""

    _fields_ = (
        *((name, c_int64) for name in ("num_segments", "page_size", "num_threads")),
        *(
            (name, c_void_p)
            for name in ("row_starts", "num_new_tokens", "contexts", "page_starts", "pages", "positions", "ancestors")
        ),
    )

    def refill(self, geometry) -> bool:
        """It points into tensors that stay where they are."""
        return True


class Attention(ctypes.Structure):
    """``Attention`` of ops.h."""

    _fields_ = (
        *((n, c_int64) for n in ("is_bfloat16", "heads", "kv_heads", "head_dim", "q_stride", "window")),
        ("scale", c_float),
    )


_ADDRESS, _COUNT = c_void_p, c_int64
_STATUS = c_int  # 0, or why it failed
_SIGNATURES = {
    "instruction_set": (c_char_p, []),
    "use": (c_int, [c_char_p]),
    "tree_attention": (None, [POINTER(Step), POINTER(Attention), *[_ADDRESS] * 6]),
    "rope_qk": (None, [*[_COUNT] * 5, *[_ADDRESS] * 8, c_float]),
    "add_rms_norm": (None, [*[_COUNT] * 3, *[_ADDRESS] * 3, c_float, *[_ADDRESS] * 2]),
    "silu_mul": (None, [*[_COUNT] * 3, *[_ADDRESS] * 2]),
    "add_silu": (None, [*[_COUNT] * 5, *[_ADDRESS] * 2]),
    "take_rows": (None, [*[_COUNT] * 5, *[_ADDRESS] * 3]),
    "top_k": (None, [*[_COUNT] * 7, *[_ADDRESS] * 3]),
    "merge_top_k": (None, [*[_COUNT] * 3, *[_ADDRESS] * 2]),
    "sample": (None, [*[_COUNT] * 6, *[_ADDRESS] * 5]),
    "linear_size": (_COUNT, [*[_COUNT] * 3]),
    "linear_pack": (None, [*[_COUNT] * 3, *[_ADDRESS] * 2]),
    "linear_run": (None, [*[_COUNT] * 5, *[_ADDRESS] * 4]),
    "quantized_run": (None, [*[_COUNT] * 7, *[_ADDRESS] * 4]),
    "accept": (None, [POINTER(Step), *[_ADDRESS] * 9]),
    "commit": (None, [*[_COUNT] * 6, _ADDRESS, _ADDRESS, _COUNT, _ADDRESS]),
    "recordable": (_COUNT, [c_char_p]),
    "recordable_name": (c_char_p, [_COUNT]),
    "replay": (_STATUS, [_ADDRESS, _COUNT]),
    "replay_timed": (_STATUS, [_ADDRESS, _COUNT, _ADDRESS]),
    # Collectives: parallel/shared_memory.py.
    "shared_bytes": (_COUNT, [_COUNT, _COUNT]),
    "shared_attach": (_ADDRESS, [c_int, _ADDRESS, *[_COUNT] * 5]),
    "shared_detach": (None, [_ADDRESS]),
    "shared_all_reduce": (_STATUS, [_ADDRESS, _COUNT, _COUNT, _ADDRESS]),
    "shared_all_reduce_add_rms_norm": (_STATUS, [_ADDRESS, *[_COUNT] * 3, *[_ADDRESS] * 3, c_float, _ADDRESS]),
    "shared_all_gather": (_STATUS, [_ADDRESS, _COUNT, _ADDRESS, _ADDRESS]),
    "shared_broadcast": (_STATUS, [_ADDRESS, _COUNT, _COUNT, _ADDRESS]),
}
_ASIDE = ("recordable", "recordable_name", "instruction_set")  # part of no step


class Library:
    """The library's functions by their names without the prefix, called with addresses and numbers.

    While a ``Recording`` is active, calls that it can repeat are noted in it, and others raise.
    """

    def __init__(self, path: Path) -> None:
        """OSError if it does not load or was built from other sources, AttributeError if it lacks a function."""
        self._native = ctypes.CDLL(str(path))
        self._native.euryale_signature.restype = c_char_p
        self.recording: Recording | None = None
        for name, (result, types) in _SIGNATURES.items():
            if (built := self._native.euryale_signature(name.encode())) != _letters(result, types):
                raise OSError(f"{path.name}: {name} takes {built}, not {_letters(result, types)}")
            function = getattr(self._native, f"euryale_{name}")
            function.argtypes, function.restype = types, result
            setattr(self, name, function)

    def record(self, recording: "Recording | None") -> None:
        """Begin, or with None end, to note what is called."""
        self.recording = recording
        for name in _SIGNATURES:
            function = getattr(self._native, f"euryale_{name}")
            if recording is None or name in _ASIDE:
                setattr(self, name, function)
            else:
                setattr(self, name, recording.noting(name, self.recordable(name.encode()), function))


class Recording:
    """Calls with their arguments, as ``replay`` reads them, and what must live as long: ``kept``."""

    def __init__(self) -> None:
        self._words: list[int] = []
        self.kept: list = []

    def noting(self, name: str, place: int, function):
        """``function``, noted whenever it is called; ``place`` -1: it cannot be repeated."""

        def call(*arguments):
            if place < 0:
                raise RuntimeError(f"{name} cannot be part of a recorded step")
            self._words += [place, len(arguments), *map(_word, arguments)]
            self.kept += [a for a in arguments if not isinstance(a, int | float | None)]
            return function(*arguments)

        return call

    def words(self) -> ctypes.Array:
        """The calls noted so far."""
        return (c_int64 * len(self._words))(*self._words)


def _letters(result, types: list) -> bytes:
    """A signature as signatures.cpp spells it."""
    kinds = {None: "v", c_float: "f", c_int: "4", c_int64: "8"}
    return "".join(kinds.get(kind, "p") for kind in (result, *types)).encode()


def _word(argument) -> int:
    if argument is None:
        return 0
    if isinstance(argument, float):
        return struct.unpack("<i", struct.pack("<f", argument))[0]
    if isinstance(argument, int):
        return argument
    return ctypes.addressof(argument.contents)  # a pointer to a structure


@cache
def library() -> Library | None:
    """The library, or None, with a warning, if it was not built here or does not load."""
    names = (f"_native{sysconfig.get_config_var('EXT_SUFFIX')}", "_native.so")
    found = [path for name in names if (path := Path(__file__).parent / name).is_file()]
    if not found:
        logger.warning(
            "the CPU kernels were not compiled, so the much slower reference kernels run: install a C++ compiler and "
            "give 'pip install .' again (in a checkout: 'python -m pip install -e .')"
        )
        return None
    _share_openmp()
    try:
        return Library(found[0])
    except (OSError, AttributeError) as error:  # not to be loaded, or built from other sources
        logger.warning("the CPU kernels must be built again; the much slower reference kernels run: %s", error)
        return None


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """An output of a kernel, of the dtype of ``like``; kept for as long as a recording that writes to it."""
    return _kept(like.new_empty(shape))


def empty_ids(*shape: int) -> torch.Tensor:
    """An int32 output of a kernel, kept likewise."""
    return _kept(torch.empty(shape, dtype=torch.int32))


def _kept(out: torch.Tensor) -> torch.Tensor:
    if (recording := library().recording) is not None:
        recording.kept.append(out)
    return out


def _share_openmp() -> None:
    """Have our kernels and PyTorch's use one pool of threads: two would spin on each other's cores. Where PyTorch
    brings an OpenMP library under a name of its own, its symbols are made known to all before ours is looked for."""
    directory = Path(torch.__file__).parent
    for folder in (directory / "lib", directory.parent / "torch.libs"):
        for file in folder.glob("libgomp*"):
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)


def step_of(geometry) -> Step:
    """A StepGeometry as the kernels read it, made once; it points into the geometry's tensors."""
    if "cpu" not in geometry.prepared:
        step = Step(len(geometry.num_new_tokens), geometry.page_size, torch.get_num_threads())
        for name in ("num_new_tokens", "contexts", "page_starts", "pages", "positions", "ancestors"):
            setattr(step, name, getattr(geometry, name).data_ptr())
        step.row_starts = geometry.starts.data_ptr()
        geometry.prepared["cpu"] = step
    return geometry.prepared["cpu"]


def halves(x: torch.Tensor) -> tuple[int, int]:
    """Addresses of ``x[0]`` and ``x[1]``, without the price of making tensors of them."""
    first = x.data_ptr()
    return first, first + x.stride(0) * x.element_size()


def instruction_set() -> str:
    """What the kernels run on: avx512_bf16, avx512, avx2, baseline, or reference if there are none."""
    lib = library()
    return lib.instruction_set().decode() if lib else "reference"


def use(instruction_set: str) -> bool:
    """Run the kernels on a narrower instruction set than the best, for tests; False if this CPU lacks it."""
    return bool(library().use(instruction_set.encode()))
