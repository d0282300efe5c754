"""What comes before the first layer and after the last, in every implementation: rows, heads, and choosing tokens."""

import functools

import pytest
import torch

from euryale.kernels.add_silu import add_silu
from euryale.kernels.linear import FrozenLinear, linear_each
from euryale.kernels.sample import sample
from euryale.kernels.sample.noise import gumbel, stream_key
from euryale.kernels.take_rows import take_rows
from euryale.kernels.top_k import merge_top_k, top_k, values_and_ids

DTYPES = (torch.float32, torch.bfloat16)
FAR_KEY = torch.tensor([stream_key(5, 0, 0)])
every_implementation = pytest.mark.usefixtures("each_implementation")


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
def test_take_rows(dtype):
    table, rows = torch.randn(7, 5).to(dtype), torch.tensor([3, 12, 0, 6, -1, 3], dtype=torch.int32)
    for offset, repeat in ((0, 1), (3, 2), (10, 1)):
        expected = torch.zeros(repeat, len(rows), 5, dtype=dtype)
        for i, row in enumerate(rows.tolist()):
            if 0 <= row - offset < 7:
                expected[:, i] = table[row - offset]
        assert torch.equal(take_rows(table, rows, offset, repeat), expected.flatten(0, 1))


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "part", "width"), [(1, 64, 64), (3, 23, 67), (4, 20, 64)])
def test_add_silu(parts, part, width, dtype):
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, width).to(dtype), (torch.randn(parts, 2, 3, part) * 4).to(dtype)
    joined = y.double().permute(1, 2, 0, 3).flatten(2)[..., :width]
    expected = x.double() + torch.nn.functional.silu(joined)
    got = add_silu(x.clone(), y)
    # Two roundings (the reference rounds SiLU too) of numbers below 16, each by at most 2^-5 in bfloat16; in float32
    # 2^-21, and the exponential's relative error of 2e-7.
    limit = {torch.float32: 5e-6, torch.bfloat16: 0.063}[dtype]
    assert float((got.double() - expected).abs().max()) < limit


@every_implementation
def test_linear_each_is_each_one_alone():
    torch.manual_seed(0)
    linears, x = [FrozenLinear(torch.randn(9, 6), torch.randn(9)) for _ in range(3)], torch.randn(3, 4, 6)
    together = linear_each(linears, x)
    for linear, its_x, its_y in zip(linears, x, together, strict=True):
        assert torch.equal(linear(its_x), its_y)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "k"), [(1, 1), (3001, 1), (3001, 7), (200, 200), (5, 9)])
def test_top_k_whole_and_in_parts(width, k, dtype):
    torch.manual_seed(0)
    x = (torch.randn(6, width) * 3).round().to(dtype)  # many ties
    x[1] = -torch.inf
    values, ids = values_and_ids(top_k(x, k))
    for row in range(6):
        expected = sorted(range(width), key=lambda i, row=row: (-float(x[row, i]), i))[:k]
        assert ids[row, : len(expected)].tolist() == expected
        assert values[row].tolist() == [float(x[row, i]) for i in expected] + [-float("inf")] * (k - len(expected))
    if width > 100:
        length = -(-width // 3)
        padded = torch.nn.functional.pad(x, (0, 3 * length - width), value=99.0)  # as ranks hold them
        shards = [padded[:, s * length : (s + 1) * length].contiguous() for s in range(3)]
        valid = [min(length, width - s * length) for s in range(3)]
        parts = torch.stack([top_k(x, k, valid[s], s * length) for s, x in enumerate(shards)])
        merged = values_and_ids(merge_top_k(parts))
        assert torch.equal(merged[0], values)
        assert torch.equal(merged[1][values > -torch.inf], ids[values > -torch.inf])


def test_top_k_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        top_k(torch.randn(1, 3), 0)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 3001])
def test_samples_are_the_largest_perturbed_logits(width, dtype):
    torch.manual_seed(0)
    logits = torch.nn.functional.pad(torch.randn(40, width) * 3, (0, 3), value=99.0).to(dtype)  # three of padding
    temperature = torch.tensor([0.0, 0.3, 1.0, 2.0] * 10)
    keys = torch.tensor([stream_key(row % 7, 0, row) for row in range(40)])
    values, ids = values_and_ids(sample(logits, temperature, keys, width, 1000))
    noise = gumbel(keys[:, None], torch.arange(width) + 1000).double()
    scaled = logits[:, :width].double() / temperature.double().clamp(min=1e-30)[:, None] + noise
    scores = torch.where(temperature[:, None] > 0, scaled, logits[:, :width].double())
    picked = scores.gather(1, (ids - 1000).long())
    # float32 scores of up to 40 have a spacing of 2^-19; two roundings, and the noise's logarithms with 2e-7 relative.
    assert float((scores.max(dim=1, keepdim=True).values - picked).abs().max()) < 1e-5
    assert float((values.double() - picked).abs().max()) < 1e-5
    assert torch.equal(ids[::4, 0] - 1000, logits[::4, :width].float().argmax(dim=1).int())


@functools.cache  # the same for every implementation
def far_noise(count: int) -> torch.Tensor:
    return gumbel(FAR_KEY, torch.arange(count))


@every_implementation
def test_the_noise_reaches_far_and_stays_finite():
    """The far tail, where float32 has to be handled with care: the largest of 2^22 noises of one key."""
    count = 1 << 22
    logits, one = torch.zeros(1, count), torch.ones(1)
    values, ids = values_and_ids(sample(logits, one, FAR_KEY, count, 0))
    noise = far_noise(count)
    assert torch.isfinite(values).all()
    assert float((values[0, 0] - noise.max()).abs()) < 1e-5
    assert int(ids) == int(noise.argmax())
    assert float(values) > 13  # log of 4 million is 15.2, and the largest lies within a few of it
