"""The compiled CPU kernels: the library, found and described for ctypes.

It is plain C++ without a word of PyTorch's or Python's headers, so that a compiler is all its build needs; calls
hand over addresses. Without it (no compiler at install time, or a checkout nobody built) everything runs on the
reference kernels, and a warning says so.
"""

import ctypes
import logging
from ctypes import POINTER, c_char_p, c_float, c_int64, c_void_p
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
            for name in ("row_starts", "num_certain", "contexts", "page_starts", "pages", "positions", "ancestors")
        ),
    )


class Attention(ctypes.Structure):
    """``Attention`` of ops.h."""

    _fields_ = (
        *((n, c_int64) for n in ("is_bfloat16", "heads", "kv_heads", "head_dim", "q_stride", "window")),
        ("scale", c_float),
    )


_ADDRESS, _COUNT = c_void_p, c_int64
_SIGNATURES = {
    "tree_attention": [POINTER(Step), POINTER(Attention), *[_ADDRESS] * 6],
    "rope_qk": [*[_COUNT] * 5, *[_ADDRESS] * 8, c_float],
    "add_rms_norm": [*[_COUNT] * 3, *[_ADDRESS] * 3, c_float, *[_ADDRESS] * 2],
    "silu_mul": [*[_COUNT] * 3, *[_ADDRESS] * 2],
    "commit": [*[_COUNT] * 6, _ADDRESS, _ADDRESS, _COUNT, _ADDRESS, _ADDRESS],
}


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None, with a warning, if it was not built here or does not load."""
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        logger.warning(
            "the CPU kernels were not compiled, so the much slower reference kernels run: install a C++ compiler and "
            "give 'pip install .' again (in a checkout: 'python -m pip install -e .')"
        )
        return None
    _share_openmp()
    try:
        lib = ctypes.CDLL(str(found[0]))
    except OSError as error:
        logger.warning("the CPU kernels do not load, so the much slower reference kernels run: %s", error)
        return None
    for name, types in _SIGNATURES.items():
        function = getattr(lib, f"euryale_{name}")
        function.argtypes, function.restype = types, None
        setattr(lib, name, function)
    lib.euryale_instruction_set.restype = c_char_p
    lib.euryale_use.argtypes = [c_char_p]
    return lib


def _share_openmp() -> None:
    """Have our kernels and PyTorch's use one pool of threads: two would spin on each other's cores. Where PyTorch
    brings an OpenMP library under a name of its own, its symbols are made known to all before ours is looked for."""
    directory = Path(torch.__file__).parent
    for folder in (directory / "lib", directory.parent / "torch.libs"):
        for file in folder.glob("libgomp*"):
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)


def halves(x: torch.Tensor) -> tuple[int, int]:
    """Addresses of ``x[0]`` and ``x[1]``, without the price of making tensors of them."""
    first = x.data_ptr()
    return first, first + x.stride(0) * x.element_size()


def instruction_set() -> str:
    """What the kernels run on: avx512, avx2, baseline, or reference if there are none."""
    lib = library()
    return lib.euryale_instruction_set().decode() if lib else "reference"


def use(instruction_set: str) -> bool:
    """Run the kernels on a narrower instruction set than the best, for tests; False if this CPU lacks it."""
    return bool(library().euryale_use(instruction_set.encode()))
