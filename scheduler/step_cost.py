"""The cost model of a step: seconds by requests, rows and context, profiled at start and corrected by every step.

A plain step is one without draft tokens, heads and prompts; its cost depends on the number of requests. Every extra
row, a draft token or a prompt token, adds to that, and so does the work of the heads. Costs are interpolated between
measured sizes, in the logarithm of requests and linearly in rows. Steps padded to buckets cost as much as the next
larger measured numbers of requests and rows. More rows never cost less.
"""

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from typing import Any

import numpy as np

from euryale.client.rules import BOOLEAN, list_of, number, whole

# Learning rates: of the scale of all steps, and of plain steps, draft tokens and prompt rows.
_SCALE_RATE, _PLAIN_RATE, _DRAFT_RATE, _PROMPT_RATE = 0.05, 0.05, 0.01, 0.5
_DISTURBED = 8.0  # steps that took this many times the predicted time are ignored


_SECONDS = number(0, 1e4)
_POSITIVE = number(0, 1e4, above=True)
_SIZES = list_of(whole(0, 1 << 20), 64, least=1)
_PROFILE = {
    "requests": _SIZES,
    "plain": list_of(_POSITIVE, 64, least=1),
    "extra": _SIZES,
    "speculating": list_of(list_of(_POSITIVE, 64, least=1), 64, least=1),
    "per_token": _SECONDS,
    "per_pair": _SECONDS,
    "is_padded": BOOLEAN,
    "drafting": list_of(_SECONDS, 64),
}


@dataclass(frozen=True)
class Profile:
    """Measured seconds of steps, for P numbers of requests and E numbers of extra rows, both increasing.

    * ``requests`` [P], ``plain`` [P]: seconds of a plain step with ``requests[i]`` requests.
    * ``extra`` [E], ``speculating`` [P, E]: seconds of a step with heads and ``extra[j]`` more rows; ``extra[0]`` is 0.
    * ``drafting`` [P], or empty: host seconds for choosing draft tokens.
    * ``per_token``: seconds for each token of context.
    * ``per_pair``: seconds for each pair of a prompt row and a token of context before it.
    * ``is_padded``: decoding steps are padded to buckets. ``extra`` then counts a bucket's rows beyond the first, and a
      bucket has at least as many rows as requests.

    Raises ValueError if times or sizes are missing, out of order or out of range.
    """

    requests: list[int]
    plain: list[float]
    extra: list[int]
    speculating: list[list[float]]
    per_token: float = 0.0
    per_pair: float = 0.0
    is_padded: bool = False
    drafting: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, rule in _PROFILE.items():
            rule.check(f"a profile's {name}", getattr(self, name))
        for sizes in (self.requests, self.extra):
            if sorted(set(sizes)) != list(sizes):
                raise ValueError("a profile lists its sizes in increasing order, none twice")
        if self.requests[0] < 1 or self.extra[0] != 0:
            raise ValueError("a profile begins with one request or more, and with 0 extra rows")
        if len(self.drafting) not in (0, len(self.requests)):
            raise ValueError("a profile has a drafting time for every number of requests, or none")
        if {len(self.plain), len(self.speculating)} != {len(self.requests)}:
            raise ValueError("a profile has a time for every number of requests")
        if {len(row) for row in self.speculating} != {len(self.extra)}:
            raise ValueError("a profile has a time for every number of extra rows")

    @classmethod
    def from_json(cls, content: object) -> "Profile":
        """Return the profile that ``to_json`` wrote. Raises ValueError for anything else."""
        names = {f.name for f in fields(cls)}
        if not isinstance(content, dict) or not {"requests", "plain", "extra", "speculating"} <= set(content) <= names:
            raise ValueError(f"a profile must be an object with some of the fields {', '.join(sorted(names))}")
        return cls(**content)

    def to_json(self) -> dict[str, Any]:
        """Return the constructor's arguments, to be written as JSON."""
        return asdict(self)


@dataclass
class StepCosts:
    """Predicted seconds of the steps of one group.

    ``scale``: current time of a step over its profiled time. ``prompt_scale``: a further factor on prompt rows.
    """

    profile: Profile
    scale: float = 1.0
    prompt_scale: float = 1.0
    # The raw values are measured ones with all corrections. The others are made from them so that costs never fall with
    # the number of requests or rows, however noisy the measurements.
    _raw_plain: list[float] = field(init=False)
    _raw_added: np.ndarray = field(init=False)
    _plain: list[float] = field(init=False)
    _added: np.ndarray = field(init=False)
    _edges: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._raw_plain = list(self.profile.plain)
        self._plain = list(accumulate(self._raw_plain, max))
        self._raw_added = np.maximum(np.asarray(self.profile.speculating) - np.asarray(self._plain)[:, None], 0)
        self._added = np.maximum.accumulate(self._raw_added, axis=1)
        self._edges = np.asarray(self.profile.extra)

    def plain(self, requests: int, context: int = 0) -> float:
        """Return the seconds of a plain step, ``context`` being the committed tokens of all requests together."""
        low, high, fraction = self._between(requests)
        seconds = (1 - fraction) * self._plain[low] + fraction * self._plain[high]
        return self.scale * seconds + self.profile.per_token * context

    def profiled_plain(self, requests: int, context: int = 0) -> float:
        """Return the profiled seconds of a plain step, without corrections."""
        low, high, fraction = self._between(requests)
        plain = self.profile.plain
        return (1 - fraction) * plain[low] + fraction * plain[high] + self.profile.per_token * context

    def speculating(self, requests: int, extra: np.ndarray, context: int = 0, prompts: bool = False) -> np.ndarray:
        """Return the seconds of speculative steps, float64 [N]: with drafting, heads and ``extra`` int [N] extra rows.

        ``prompts``: some of these rows are of prompts; such steps are not padded."""
        low, high, fraction = self._between(requests)
        added = (1 - fraction) * self._added[low] + fraction * self._added[high]
        drafting = self.profile.drafting
        host = float(np.interp(requests, self.profile.requests, drafting)) if drafting else 0.0
        return self.plain(requests, context) + self.scale * (host + self._at(extra, added, high, not prompts))

    def are_full(self, requests: int, extra: np.ndarray) -> np.ndarray:
        """Return whether decoding steps with ``extra`` int [N] extra rows fill their bucket exactly, bool [N].

        Without extra rows the answer is True, since a step need not have draft tokens."""
        high = self._between(requests)[1]
        rows, edges = extra + self.profile.requests[high] - 1, self._edges
        return (extra == 0) | (edges[np.minimum(np.searchsorted(edges, rows), len(edges) - 1)] == rows)

    def prefilling(self, requests: int, extra: np.ndarray, context: int = 0, before: int = 0) -> np.ndarray:
        """Return the seconds of steps with prompt rows and without heads, float64 [N].

        ``requests`` decode beside ``extra`` int [N] prompt rows that follow ``before`` computed tokens."""
        low, high, fraction = self._between(requests)
        added = (1 - fraction) * self._added[low] + fraction * self._added[high]
        seconds = self.scale * self._at(extra, added - added[0], high, False) + self.profile.per_pair * extra * before
        return self.plain(requests, context) + self.prompt_scale * seconds

    def learn(self, predicted: float, measured: float, requests: int, extra: int, is_speculating: bool) -> None:
        """Correct the costs by a step's predicted and measured seconds.

        ``requests`` decoded with ``extra`` draft tokens. The scale of all steps is learned faster than the cost of this
        number of draft tokens."""
        if measured > _DISTURBED * predicted:
            return
        ratio = min(2.0, max(0.5, measured / predicted))
        self.scale *= ratio**_SCALE_RATE
        low, high, fraction = self._between(requests)
        nearest = high if fraction > 0.5 else low
        if is_speculating:
            place = min(bisect_left(self.profile.extra, extra + self._start(nearest)), len(self.profile.extra) - 1)
            self._raw_added[nearest, place] *= ratio**_DRAFT_RATE
            self._added[nearest] = np.maximum.accumulate(self._raw_added[nearest])
        else:
            self._raw_plain[nearest] *= ratio**_PLAIN_RATE
            self._plain = list(accumulate(self._raw_plain, max))

    def learn_prompts(self, predicted: float, measured: float) -> None:
        """Correct the cost of prompt rows by a step that had some. The rate is high, as the next chunk is similar."""
        ratio = min(2.0, max(0.5, measured / predicted))
        self.prompt_scale = min(10.0, max(0.1, self.prompt_scale * ratio**_PROMPT_RATE))

    def _between(self, requests: int) -> tuple[int, int, float]:
        """Return the places of the measured numbers of requests around this one, and the fraction between."""
        sizes = self.profile.requests
        high = min(bisect_left(sizes, requests), len(sizes) - 1)
        low = high if sizes[high] <= requests or self.profile.is_padded else max(0, high - 1)
        if low == high:
            return low, high, 0.0
        return low, high, math.log(requests / sizes[low]) / math.log(sizes[high] / sizes[low])

    def _start(self, place: int) -> int:
        """Return which number of extra rows in the profile stands for none, at a measured number of requests."""
        return self.profile.requests[place] - 1 if self.profile.is_padded else 0

    def _at(self, extra: np.ndarray, added: np.ndarray, place: int, is_padded: bool) -> np.ndarray:
        """Return the seconds that ``extra`` int [N] extra rows add, float64 [N], from those measured, ``added`` [E]."""
        edges, rows = self._edges, extra + self._start(place)
        beyond = np.maximum(rows - edges[-1], 0)
        slope = (added[-1] - added[0]) / max(edges[-1] - self._start(place), 1)
        if self.profile.is_padded and is_padded:
            return added[np.minimum(np.searchsorted(edges, rows), len(edges) - 1)] + beyond * slope
        return np.interp(rows, edges, added) + beyond * slope
