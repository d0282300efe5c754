"""The compiled CPU kernels: finds the library, and holds what the ``cpu.py`` of every operation needs to call it.

The library is plain C++ without headers of PyTorch or Python, so a compiler is all that its build needs; calls pass
addresses. Without a library the reference kernels run, and a warning says so.
"""

import logging
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch

from euryale.kernels.cpu.native import Library
from euryale.kernels.step_metadata import StepMetadata
from euryale.kernels.threads import num_threads

logger = logging.getLogger("euryale.kernels")

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # is_bfloat16


@cache
def load() -> Library | None:
    """The library, or None, with a warning, if it was not built here, does not load, or was built from other
    sources."""
    names = (f"_native{sysconfig.get_config_var('EXT_SUFFIX')}", "_native.so")
    found = [path for name in names if (path := Path(__file__).parent / name).is_file()]
    if not found:
        logger.warning(
            "the CPU kernels were not compiled, so the much slower reference kernels run: install a C++ compiler and "
            "run 'pip install .' again (in a checkout: 'python -m pip install -e .')"
        )
        return None
    try:
        return Library(found[0])
    except OSError as error:
        logger.warning(
            "the CPU kernels must be built again (in a checkout: 'python -m pip install -e .'); the much slower "
            "reference kernels run: %s",
            error,
        )
        return None


@cache
def library() -> Library:
    """The library. RuntimeError if there is none: ``backend`` then picks the reference kernels."""
    if (loaded := load()) is None:
        raise RuntimeError("the CPU kernels are not built: run 'python -m pip install -e .'")
    return loaded


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """An output of a kernel, of the dtype of ``like``. A recording that writes to it keeps it alive."""
    return _kept(like.new_empty(shape))


def empty_ids(*shape: int) -> torch.Tensor:
    """An int32 output of a kernel, kept alive likewise."""
    return _kept(torch.empty(shape, dtype=torch.int32))


def _kept(out: torch.Tensor) -> torch.Tensor:
    if (recording := library().recording) is not None:
        recording.kept.append(out)
    return out


class _PreparedStep:
    """``pointer`` to a ``Step`` of operations.def, whose fields point to the tensors of a StepMetadata."""

    def __init__(self, metadata: StepMetadata) -> None:
        sizes = {
            "num_segments": len(metadata.num_new_tokens),
            "page_size": metadata.page_size,
            "num_threads": num_threads(),
        }
        addresses = {name: tensor.data_ptr() for name, tensor in metadata.tensors().items()}
        self.pointer = library().structure("Step", {**sizes, **addresses})

    def refill(self, metadata: StepMetadata) -> bool:
        """Nothing to do for another step of the same shape: its tensors are in the same place."""
        return True


def step_of(metadata: StepMetadata) -> Any:
    """A ctypes pointer to the metadata as the kernels read it, made once per step."""
    return metadata.once(_PreparedStep).pointer


def halves(x: torch.Tensor) -> tuple[int, int]:
    """Addresses of ``x[0]`` and ``x[1]``, without the cost of making tensors of them."""
    first = x.data_ptr()
    return first, first + x.stride(0) * x.element_size()


def instruction_set() -> str:
    """What the kernels run on: avx512_bf16, avx512, avx2, baseline, or reference if there are none."""
    return library().instruction_set().decode() if load() else "reference"


def use(instruction_set: str) -> bool:
    """Run the kernels on a narrower instruction set than the best, for tests. False if this CPU lacks it."""
    return bool(library().use(instruction_set.encode()))
