"""Calls the compiled matrix products (cpu.h and quantized.h beside this file) with weights packed in reading order."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from euryale.kernels import cpu
from euryale.kernels.cpu import empty  # noqa: F401
from euryale.kernels.linear.quantize import QuantizedWeight, Weight
from euryale.kernels.threads import num_threads

VECTORS, BLOCK = 4, 8  # of quantized.h
_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # of a block's inputs in a word


@dataclass(frozen=True)
class Packed:
    """A quantized weight as quantized.h reads it: bits per weight, and ``group``, the inputs that share a scale."""

    data: torch.Tensor
    bits: int
    group: int


def pack(weight: Weight) -> torch.Tensor | Packed:
    """Packs ``weight`` [out, in] for the instruction set in use; the layout is private to its kernels."""
    if isinstance(weight, QuantizedWeight):
        return _pack_quantized(weight)
    library, kind = cpu.library(), cpu.DTYPES[weight.dtype]
    out_features, in_features = weight.shape
    packed = weight.new_empty(library.linear_size(kind, in_features, out_features))
    source = weight.contiguous()
    library.linear_pack(kind, in_features, out_features, source.data_ptr(), packed.data_ptr())
    return packed


def _pack_quantized(weight: QuantizedWeight) -> Packed:
    bits = {"int8": 8, "int4": 4}[weight.kind]
    out_features, in_features = weight.shape
    panel = cpu.library().linear_size(0, 1, 1)
    group = -(-weight.group // BLOCK) * BLOCK
    groups, panels = -(-in_features // group), -(-out_features // panel)
    rows = panels * panel - out_features

    def bytes_of(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().view(torch.uint8).flatten(2)

    values = F.pad(weight.values, (0, groups * group - in_features, 0, rows))
    # [panel, vector of outputs, output, group, block, input]
    values = values.view(panels, VECTORS, panel // VECTORS, groups, group // BLOCK, BLOCK)
    if bits == 8:
        stored = values.permute(0, 3, 4, 1, 5, 2)
    else:
        shifts = torch.tensor(_SHIFTS, dtype=torch.int32)
        stored = ((values.int() + 8) << shifts).sum(dim=-1, dtype=torch.int32).permute(0, 3, 4, 1, 2)
    tables = [weight.scales] if weight.zeros is None else [weight.scales, weight.zeros]
    tables = [F.pad(x, (0, 0, 0, rows)).view(panels, panel, groups).transpose(1, 2) for x in tables]
    data = torch.cat([bytes_of(x) for x in (stored, *tables)], dim=2)
    return Packed(data, bits, group)


def linear(
    x: torch.Tensor,
    packed: torch.Tensor | Packed,
    bias: torch.Tensor | None,
    out_features: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Returns x W^T + b [R, out_features]."""
    x = x.contiguous()
    rows, in_features = x.shape
    y = cpu.empty(x, rows, out_features) if out is None else out
    kind, threads, library = cpu.DTYPES[x.dtype], num_threads(), cpu.library()
    sizes = (threads, rows, in_features, out_features)
    added, to = None if bias is None else bias.data_ptr(), y.data_ptr()
    if isinstance(packed, Packed):
        library.quantized_run(kind, packed.bits, packed.group, *sizes, x.data_ptr(), packed.data.data_ptr(), added, to)
    else:
        library.linear_run(kind, *sizes, x.data_ptr(), packed.data_ptr(), added, to)
    return y
