"""Log-probabilities of consecutive tokens, packed as on the wire, without numpy."""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload


class TokenLogprob(NamedTuple):
    """The ``logprob`` of a token, and ``top``: pairs of a likely token in its place and its log-probability, likeliest
    first. In nats."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Logprobs(Sequence[TokenLogprob]):
    """A sequence of TokenLogprob.

    Packed little-endian: ``chosen`` float32 [T], ``top_tokens`` int32 [T, N] and ``top_logprobs`` float32 [T, N].
    Raises ValueError if these sizes do not match.
    """

    chosen: bytes = b""
    top_tokens: bytes = b""
    top_logprobs: bytes = b""

    def __post_init__(self) -> None:
        count, tops = len(self.chosen), len(self.top_tokens)
        fits = not tops if not count else tops % count == 0
        if count % 4 or not fits or tops != len(self.top_logprobs):
            raise ValueError("must hold float32 [T], int32 [T, N] and float32 [T, N]")

    def __len__(self) -> int:
        return len(self.chosen) // 4

    @overload
    def __getitem__(self, place: int) -> TokenLogprob: ...
    @overload
    def __getitem__(self, place: slice) -> "Logprobs": ...
    def __getitem__(self, place: int | slice) -> "TokenLogprob | Logprobs":
        if isinstance(place, slice):
            return self._part(place)
        at = range(len(self))[place]
        (logprob,) = struct.unpack_from("<f", self.chosen, 4 * at)
        width = self.width
        ids = struct.unpack_from(f"<{width}i", self.top_tokens, 4 * at * width)
        values = struct.unpack_from(f"<{width}f", self.top_logprobs, 4 * at * width)
        return TokenLogprob(logprob, tuple(zip(ids, values, strict=True)))

    def __add__(self, other: "Logprobs") -> "Logprobs":
        """Concatenates both; see ``join``."""
        return Logprobs.join([self, other])

    @classmethod
    def join(cls, parts: Iterable["Logprobs"]) -> "Logprobs":
        """Concatenates the parts. Raises ValueError if they differ in N."""
        parts = [part for part in parts if part]
        if len({part.width for part in parts}) > 1:
            raise ValueError("log-probabilities with different numbers of likeliest tokens cannot be joined")
        fields = ("chosen", "top_tokens", "top_logprobs")
        return cls(*(b"".join(getattr(part, name) for part in parts) for name in fields))

    @property
    def width(self) -> int:
        """N, the number of likeliest tokens in each place."""
        return len(self.top_tokens) // len(self.chosen) if self.chosen else 0

    def _part(self, place: slice) -> "Logprobs":
        start, stop, step = place.indices(len(self))
        if step != 1:
            raise ValueError("log-probabilities support only slices with step 1")
        stop, width = max(start, stop), self.width
        parts = ((self.chosen, 4), (self.top_tokens, 4 * width), (self.top_logprobs, 4 * width))
        return Logprobs(*(packed[start * size : stop * size] for packed, size in parts))


def pack_logprobs(value: Logprobs) -> list[bytes]:
    """Returns the three byte strings of ``value``, as they are sent."""
    return [value.chosen, value.top_tokens, value.top_logprobs]


def unpack_logprobs(value: Any) -> Logprobs:
    """Inverts ``pack_logprobs``. Raises ValueError for any other value."""
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(part, bytes) for part in value):
        raise ValueError("must be a list of three byte strings")
    return Logprobs(*value)
