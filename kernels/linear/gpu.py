"""Quantized weights as torchao tensors, whose ``F.linear`` picks the GPU's kernels. CPUs use the same numbers."""

import torch
import torch.nn.functional as F

from euryale.kernels.linear.quantize import QuantizedWeight, library


def tensor(weight: QuantizedWeight) -> torch.Tensor:
    """A tensor subclass [out, in] of ``weight.dtype``. ValueError for sizes that the kernels do not support."""
    return {"int8": _int8, "int4": _int4, "fp8": _fp8}[weight.kind](weight)


def _int8(weight: QuantizedWeight) -> torch.Tensor:
    block = [1, weight.shape[1]]
    return library().Int8Tensor(weight.values.contiguous(), weight.scales, block, weight.dtype)


def _int4(weight: QuantizedWeight) -> torch.Tensor:
    """The layout of ``aten::_weight_int4pack_mm``: outputs padded to a multiple of 8, inputs to a multiple of 1,024.
    Scales and zeros of the padding are 0, so its weights are 0 too."""
    assert weight.zeros is not None, "int4 has zeros"
    out, width = weight.shape
    rows, columns = -out % 8, -width % 1024
    values = F.pad(weight.values.int() + 8, (0, columns, 0, rows))
    pairs = (values[:, ::2] << 4 | values[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    missing = values.shape[1] // weight.group - weight.scales.shape[1]
    scales, zeros = (F.pad(x, (0, missing, 0, rows)) for x in (weight.scales, weight.zeros))
    both = torch.stack([scales, zeros], dim=2).transpose(0, 1).contiguous()  # [groups, out, 2]
    return library().Int4TilePackedTo4dTensor(packed, both, [1, weight.group], weight.shape)


def _fp8(weight: QuantizedWeight) -> torch.Tensor:
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        raise ValueError(
            f"--quantization fp8 cannot store a rank's matrix of {list(weight.shape)}: sizes must be multiples of 16; "
            "use another number of ranks or --quantization int8"
        )
    kernel = library("quantize_.common").KernelPreference.TORCH
    float8 = library("quantize_.workflows")
    kwargs = float8.QuantizeTensorToFloat8Kwargs(granularity=library("granularity").PerRow(), kernel_preference=kernel)
    return float8.Float8Tensor(
        weight.values,
        weight.scales,
        block_size=[1, weight.shape[1]],
        mm_config=library().Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=kwargs,
        kernel_preference=kernel,
        dtype=weight.dtype,
    )
