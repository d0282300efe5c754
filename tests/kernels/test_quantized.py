"""Quantized products against the numbers that the stored weights stand for, in float64, and against torchao's own."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torchao.quantization import Int8Tensor
from torchao.quantization.granularity import PerRow
from torchao.quantization.quant_primitives import MappingType, _choose_qparams_affine_tinygemm

from euryale.kernels.linear import FrozenLinear, gpu
from euryale.kernels.linear.quantize import GROUP, check, concatenated, quantize

DTYPES = (torch.float32, torch.bfloat16)
# The rounding of an output in its own dtype, 2^-24 and 2^-9, and some room for sums in another order.
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).square().mean().sqrt() / expected.double().square().mean().sqrt())


@pytest.mark.usefixtures("each_implementation")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("sizes", [(67, 33), (1, 1), (128, 64), (130, 72), (65, 7)])
def test_the_product_is_that_of_the_numbers_stored(sizes, kind, dtype):
    torch.manual_seed(0)
    out, width = sizes
    weight, bias = torch.randn(out, width).to(dtype), torch.randn(out).to(dtype)
    stored = quantize(weight, kind)
    for added in (bias, None):
        linear = FrozenLinear(stored, added)
        for rows in (1, 2, 3, 4, 5, 6, 7, 13, 50):  # one tile of every height, several, unpacked first
            x = torch.randn(rows, width).to(dtype)
            expected = F.linear(x.double(), stored.dequantized().double(), None if added is None else added.double())
            got = linear(x)
            assert got.dtype == dtype
            assert relative_error(got, expected) < LIMITS[dtype]


@pytest.mark.usefixtures("each_implementation")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_every_single_weight_is_in_its_place(kind):
    """The product with a unit vector is a column of the weight, whatever the order in memory."""
    torch.manual_seed(0)
    stored = quantize(torch.randn(70, 66), kind)
    got = FrozenLinear(stored)(torch.eye(66))
    # One product and, of int4, the sum of a product and a zero: two roundings of 2^-24 each.
    torch.testing.assert_close(got, stored.dequantized().T, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_rounding_is_at_most_half_a_step(kind):
    torch.manual_seed(0)
    weight = torch.randn(40, 64)
    weight[3] = 0  # rows and groups without any spread
    weight[4, :GROUP] = 0.7
    stored = quantize(weight, kind)
    error, row = (stored.dequantized() - weight).abs(), weight.abs().amax(dim=1, keepdim=True)
    if kind == "int8":
        limit = row / 127 * 0.501
    elif kind == "fp8":
        limit = weight.abs() / 16 * 1.001 + row / 448 * 2**-9  # 3 bits of mantissa; the smallest are subnormal
    else:
        spread = weight.view(40, -1, GROUP).amax(dim=2) - weight.view(40, -1, GROUP).amin(dim=2)
        # The scale is rounded to bfloat16, 8 steps from the middle; so is the zero.
        limit = spread.repeat_interleave(GROUP, dim=1) / 15 * (0.501 + 8 * 2**-8) + row * 2**-8
    assert (error <= limit + 1e-30).all()


def test_the_arithmetic_is_torchaos():
    torch.manual_seed(0)
    weight = torch.randn(24, 64)
    ours, theirs = quantize(weight, "int8"), Int8Tensor.from_hp(weight, PerRow())
    assert torch.equal(ours.values, theirs.qdata)
    assert torch.equal(ours.scales, theirs.scale)
    ours = quantize(weight, "int4")
    limits = {"quant_min": 0, "quant_max": 15, "scale_dtype": torch.bfloat16, "zero_point_dtype": torch.bfloat16}
    scale, zero = _choose_qparams_affine_tinygemm(weight, MappingType.ASYMMETRIC, (1, GROUP), torch.int32, **limits)
    assert torch.equal(ours.scales, scale.view(24, -1))
    assert torch.equal(ours.zeros, zero.view(24, -1))


def test_joined_weights_are_quantized_apart():
    torch.manual_seed(0)
    parts = [torch.randn(3, 40), torch.randn(5, 40)]
    for kind in ("int8", "int4", "fp8"):
        together = concatenated([quantize(p, kind) for p in parts])
        assert torch.equal(together.dequantized(), quantize(torch.cat(parts), kind).dequantized())


def test_the_tensors_for_gpus_stand_for_the_same_numbers():
    """As far as that can be asked without a GPU: int4's layout needs one."""
    torch.manual_seed(0)
    weight, x = torch.randn(32, 48).bfloat16(), torch.randn(3, 48).bfloat16()
    stored = quantize(weight, "int8")
    expected = F.linear(x.double(), stored.dequantized().double())
    # The product is rounded to bfloat16 before and after it is scaled, and the scale is.
    assert relative_error(F.linear(x, gpu.tensor(stored)), expected) < 3 * LIMITS[torch.bfloat16]
    assert torch.equal(
        gpu.tensor(quantize(weight, "fp8")).dequantize(torch.float32), quantize(weight, "fp8").dequantized()
    )
    with pytest.raises(ValueError, match=r"multiples of 16; use another number of ranks"):
        gpu.tensor(quantize(torch.randn(30, 48), "fp8"))


def test_what_cannot_run_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"fp8 needs a GPU.*runs on the CPU: use int8 or int4"):
        check("fp8", torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(ValueError, match=r"compute capability 8\.9"):
        check("fp8", torch.device("cuda"), torch.bfloat16)
    with pytest.raises(ValueError, match="int4 on a GPU needs --dtype bfloat16"):
        check("int4", torch.device("cuda"), torch.float32)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"pip install 'euryale\[quantize\]'"):
        check("int8", torch.device("cpu"), torch.float32)
    check("none", torch.device("cpu"), torch.float32)
