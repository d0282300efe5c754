"""Sampling noise: a pure function of request seed, sample index, output index and token id.

It depends on nothing else, so a request draws the same tokens in every batch, tree and group, and a rank computes the
noise of its own tokens only. The generator is SplitMix64, used as a counter-based generator.
"""

import torch

_MASK = (1 << 64) - 1


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


# The generator's constants as signed 64-bit integers.
GOLDEN, MIX_1, MIX_2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def stream_key(seed: int, sample_index: int, output_index: int) -> int:
    """The key of the noise for one output token, as a signed 64-bit integer. ``seed`` is unsigned 64-bit."""
    key = 0
    for value in (seed, sample_index, output_index):
        key = _mix_int((key + value + GOLDEN) & _MASK)
    return _signed(key)


def _mix_int(z: int) -> int:
    z = (z ^ z >> 30) * MIX_1 & _MASK
    z = (z ^ z >> 27) * MIX_2 & _MASK
    return z ^ z >> 31


def gumbel(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32, for int64 ``keys`` and int64 token ``ids`` of the whole vocabulary; the two are
    broadcast together.

    u has 32 bits and lies strictly between 0 and 1. log1p keeps the far tail, which a 24-bit u would cut off at
    -log(2^-24) = 16.6.
    """
    z = keys + (ids + 1) * GOLDEN  # relies on int64 arithmetic that wraps
    z = (z ^ _shift(z, 30)) * MIX_1
    z = (z ^ _shift(z, 27)) * MIX_2
    bits = _shift(z ^ _shift(z, 31), 32)
    u = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(
        max=1 - 2.0**-24
    )  # float32 would round the largest values to 1
    return -torch.log(-torch.log1p(-u))


def _shift(z: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift to the right; PyTorch's is arithmetic."""
    return (z >> by) & ((1 << (64 - by)) - 1)
