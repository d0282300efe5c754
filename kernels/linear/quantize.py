"""Weight quantization to small integers or float8 with torchao's arithmetic.

``int8``: one scale per output. ``int4``: a scale and a zero point for every GROUP inputs of an output. ``fp8``: e4m3
with one scale per output; activations are quantized per row when they are multiplied. ``int8`` and ``int4`` do not
quantize activations.
"""

import importlib
import logging
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F

QUANTIZATIONS = ("none", "int8", "int4", "fp8")
GROUP = 32  # inputs; the smallest group that torchao's GPU kernel supports


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight [out, in] that stands for ``values * scales + zeros``.

    ``values`` [out, in]: int8 (-8 to 7 for int4) or float8_e4m3fn. ``scales`` [out, ceil(in / group)]: float32, for
    int4 bfloat16; each covers ``group`` inputs. ``zeros``: like ``scales`` for int4, None otherwise. ``dtype``: that of
    the activations.
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
        """The weight that it stands for: float32 [out, in]."""
        spread = lambda x: x.float().repeat_interleave(self.group, dim=1)[:, : self.shape[1]]  # noqa: E731
        weight = self.values.float() * spread(self.scales)
        return weight if self.zeros is None else weight + spread(self.zeros)


Weight = torch.Tensor | QuantizedWeight


def concatenated(weights: list[Weight]) -> Weight:
    """Concatenates weights [out_i, in] of the same kind along their outputs."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(cast("list[torch.Tensor]", weights))
    cat = lambda name: torch.cat([getattr(w, name) for w in weights])  # noqa: E731
    zeros = None if first.zeros is None else cat("zeros")
    return replace(first, values=cat("values"), scales=cat("scales"), zeros=zeros)


def library(name: str = "") -> Any:
    """``torchao.quantization``, or its module ``name``. ValueError if torchao is not installed."""
    for noisy in ("torchao", "torch.utils._pytree"):  # their warnings do not concern users of this package
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        return importlib.import_module("torchao.quantization" + (name and f".{name}"))
    except ImportError as error:
        raise ValueError(f"--quantization needs torchao: pip install 'euryale[quantize]' ({error})") from error


def check(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError, which says what to use instead, if ``kind`` cannot run on ``device`` with ``dtype`` or torchao is
    missing."""
    if kind == "none":
        return
    library()
    if kind == "fp8":
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        if capability is None or capability < (9, 0):
            here = "the CPU" if capability is None else f"a GPU of compute capability {capability[0]}.{capability[1]}"
            raise ValueError(
                f"--quantization fp8 needs a GPU of compute capability 9.0 (Hopper) or later, and this runs on {here}: "
                "use int8 or int4"
            )
    if kind != "int8" and device.type == "cuda" and dtype != torch.bfloat16:
        raise ValueError(f"--quantization {kind} on a GPU needs --dtype bfloat16")


def quantize(weight: torch.Tensor, kind: str) -> Weight:
    """Quantizes ``weight`` [out, in] to ``kind``; ``none`` returns it unchanged. Computed in float32, so the result is
    the same on every device. ValueError if torchao is not installed."""
    if kind == "none":
        return weight
    exact, width = weight.float(), weight.shape[1]
    if kind == "int4":
        values, scales, zeros = _int4(exact)
        return QuantizedWeight(kind=kind, values=values, scales=scales, zeros=zeros, group=GROUP, dtype=weight.dtype)
    row = library("granularity").PerRow()
    if kind == "int8":
        made = library().Int8Tensor.from_hp(exact, row)
    else:
        preference = library("quantize_.common").KernelPreference.TORCH
        # Without a lower bound, outputs of zeros, which pad shards, would get the scale 0.
        made = library().Float8Tensor.from_hp(exact, granularity=row, hp_value_lb=1e-12, kernel_preference=preference)
    return QuantizedWeight(kind=kind, values=made.qdata, scales=made.scale, zeros=None, group=width, dtype=weight.dtype)


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, scales and zeros in the format of PyTorch's int4 kernels. An incomplete last group is padded with its
    last input, which changes neither its largest nor its smallest weight."""
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
