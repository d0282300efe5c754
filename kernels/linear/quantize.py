"""Weights as small integers or float8: what is stored, and torchao's arithmetic that makes it.

``int8``: one scale an output. ``int4``: a scale and a zero for every GROUP inputs of an output. ``fp8``: e4m3, one
scale an output; activations are quantized row by row when multiplied. The first two leave activations alone.
"""

import importlib
import logging
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

QUANTIZATIONS = ("none", "int8", "int4", "fp8")
GROUP = 32  # inputs; also what torchao's kernel for GPUs takes at the least


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight [out, in] that is ``values * scales + zeros``, the two given for each ``group`` of inputs.

    ``values`` [out, in]: int8, int4's from -8 to 7, or float8_e4m3fn; ``scales`` [out, ceil(in / group)], float32 or
    for int4 bfloat16; ``zeros`` likewise, None unless int4. ``dtype``: of the activations it is multiplied with.
    """

    kind: str
    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group: int
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __len__(self) -> int:
        return len(self.values)

    def dequantized(self) -> torch.Tensor:
        """The weight as the numbers it stands for: float32 [out, in]."""
        spread = lambda x: x.float().repeat_interleave(self.group, dim=1)[:, : self.shape[1]]  # noqa: E731
        weight = self.values.float() * spread(self.scales)
        return weight if self.zeros is None else weight + spread(self.zeros)


Weight = torch.Tensor | QuantizedWeight


def concatenated(weights: list[Weight]) -> Weight:
    """Weights with the same input, one below the other."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(weights)
    cat = lambda name: torch.cat([getattr(w, name) for w in weights])  # noqa: E731
    zeros = None if first.zeros is None else cat("zeros")
    return replace(first, values=cat("values"), scales=cat("scales"), zeros=zeros)


def library(name: str = ""):
    """``torchao.quantization`` or a module of it; ValueError that says how to get it."""
    for noisy in ("torchao", "torch.utils._pytree"):  # they warn of what concerns nobody here
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        return importlib.import_module("torchao.quantization" + (name and f".{name}"))
    except ImportError as error:
        raise ValueError(f"--quantization needs torchao: pip install 'euryale[quantize]' ({error})") from error


def check(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError, with the way out, where this quantization cannot run or torchao is missing."""
    if kind == "none":
        return
    library()
    if kind == "fp8":
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        if capability is None or capability < (9, 0):
            here = "the CPU" if capability is None else f"a GPU of compute capability {capability[0]}.{capability[1]}"
            raise ValueError(
                f"--quantization fp8 needs a GPU that multiplies e4m3 row by row, Hopper (9.0) or later, and this runs "
                f"on {here}: give int8 or int4"
            )
    if kind != "int8" and device.type == "cuda" and dtype != torch.bfloat16:
        raise ValueError(f"--quantization {kind} on a GPU needs --dtype bfloat16: its kernels know no other")


def quantize(weight: torch.Tensor, kind: str) -> Weight:
    """``weight`` [out, in] as ``kind`` stores it; itself for ``none``. Computed in float32, so that it is the same on
    every device. ValueError for sizes that fp8's products do not take."""
    if kind == "none":
        return weight
    exact, width = weight.float(), weight.shape[1]
    stored = {"kind": kind, "dtype": weight.dtype}
    if kind == "int4":
        values, scales, zeros = _int4(exact)
        return QuantizedWeight(values=values, scales=scales, zeros=zeros, group=GROUP, **stored)
    row = library("granularity").PerRow()
    if kind == "int8":
        made = library().Int8Tensor.from_hp(exact, row)
    else:
        preference = library("quantize_.common").KernelPreference.TORCH
        # Without a least value the scale of an output of zeros, as shards are padded with, would be 0.
        made = library().Float8Tensor.from_hp(exact, granularity=row, hp_value_lb=1e-12, kernel_preference=preference)
    return QuantizedWeight(values=made.qdata, scales=made.scale, zeros=None, group=width, **stored)


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, scales and zeros as the format of PyTorch's int4 kernels has them. A last group that is not full is
    filled up with its last input, which changes neither its largest nor its smallest weight."""
    primitives = library("quant_primitives")
    out, width = weight.shape
    full = F.pad(weight[None], (0, -width % GROUP), mode="replicate")[0]
    block, limits = (1, GROUP), {"quant_min": 0, "quant_max": 15}
    scales, zeros = primitives._choose_qparams_affine_tinygemm(
        full,
        primitives.MappingType.ASYMMETRIC,
        block,
        torch.int32,
        **limits,
        scale_dtype=torch.bfloat16,
        zero_point_dtype=torch.bfloat16,
    )
    scales, zeros = scales.view(out, -1), zeros.view(out, -1)
    values = primitives._quantize_affine_tinygemm(full, block, scales.float(), zeros.float(), torch.int32, **limits)
    return (values[:, :width] - 8).to(torch.int8), scales, zeros
