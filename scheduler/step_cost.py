"""What a step costs: seconds by requests, rows and context, profiled at start and corrected by every step since.

A step without guesses costs what its number of requests says. Every further row, a guess or a prompt's, adds to that,
the first of them the heads' work too. Between measured sizes costs are interpolated, in the logarithm of the requests
and linearly in rows. With ``steps`` decoding steps are padded to buckets: they cost what the next measured numbers of
requests and of rows in all cost. More rows never cost less.
"""

from bisect import bisect_left
from dataclasses import asdict, dataclass, field, fields

import numpy as np

from euryale.client.rules import BOOLEAN, list_of, number, whole

_RATE, _RATE_OF_PLAIN, _RATE_OF_GUESSES, _RATE_OF_PROMPTS = 0.05, 0.05, 0.01, 0.5  # of learning
_DISTURBED = 8.0  # a step that took so much longer than predicted says nothing about its size


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
    "steps": BOOLEAN,
    "choosing": list_of(_SECONDS, 64),
}


@dataclass(frozen=True)
class Profile:
    """Measured seconds. ``requests`` int [P] and ``plain`` float [P]: steps of so many requests without guesses or
    heads; ``extra`` int [E] and ``speculating`` float [P, E]: with heads and so many further rows (the first: 0);
    ``choosing`` float [P], or empty: what the host takes to choose guesses for so many requests, beside all that;
    ``per_token``: for each token of context; ``per_pair``: for each row of a prompt and token of context before it;
    ``steps``: decoding steps are padded, and ``extra`` are the rows of their buckets beyond the first row, where a
    bucket has as many rows as requests at least."""

    requests: list[int]
    plain: list[float]
    extra: list[int]
    speculating: list[list[float]]
    per_token: float = 0.0
    per_pair: float = 0.0
    steps: bool = False
    choosing: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, rule in _PROFILE.items():
            rule.check(f"a profile's {name}", getattr(self, name))
        for sizes in (self.requests, self.extra):
            if sorted(set(sizes)) != list(sizes):
                raise ValueError("a profile lists its sizes in increasing order, none twice")
        if self.requests[0] < 1 or self.extra[0] != 0:
            raise ValueError("a profile begins with one request or more, and with 0 extra rows")
        if len(self.choosing) not in (0, len(self.requests)):
            raise ValueError("a profile has a time for choosing at every number of requests, or none")
        if {len(self.plain), len(self.speculating)} != {len(self.requests)}:
            raise ValueError("a profile has a time for every number of requests")
        if {len(row) for row in self.speculating} != {len(self.extra)}:
            raise ValueError("a profile has a time for every number of extra rows")

    @classmethod
    def from_json(cls, content: object) -> "Profile":
        """The inverse of ``to_json``; ValueError for anything else."""
        names = {f.name for f in fields(cls)}
        if not isinstance(content, dict) or not {"requests", "plain", "extra", "speculating"} <= set(content) <= names:
            raise ValueError(f"a profile must be an object with some of the fields {', '.join(sorted(names))}")
        return cls(**content)

    def to_json(self) -> dict:
        return asdict(self)


@dataclass
class StepCosts:
    """The curve C(rows, context) of one group. ``scale`` is how much slower than profiled steps are by now, and
    ``prompt_scale`` how much slower still the rows of prompts."""

    profile: Profile
    scale: float = 1.0
    prompt_scale: float = 1.0
    # As measured, and corrected since; and what is believed: costs never fall with requests or rows, however noisy the
    # measurements.
    _raw_plain: np.ndarray = field(init=False)
    _raw_added: np.ndarray = field(init=False)
    _plain: np.ndarray = field(init=False)
    _added: np.ndarray = field(init=False)
    _edges: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._raw_plain = np.asarray(self.profile.plain, dtype=np.float64).copy()
        added = np.asarray(self.profile.speculating, dtype=np.float64) - np.maximum.accumulate(self._raw_plain)[:, None]
        self._raw_added = np.maximum(added, 0)
        self._edges = np.asarray(self.profile.extra)
        self._believe()

    def _believe(self) -> None:
        self._plain = np.maximum.accumulate(self._raw_plain)
        self._added = np.maximum.accumulate(self._raw_added, axis=1)

    def plain(self, requests: int, context: int = 0) -> float:
        """Seconds of a step that only decodes."""
        low, high, share = self._between(requests)
        seconds = (1 - share) * self._plain[low] + share * self._plain[high]
        return self.scale * float(seconds) + self.profile.per_token * context

    def profiled_plain(self, requests: int, context: int = 0) -> float:
        """Seconds of a step that only decodes, as profiled, without any correction since."""
        low, high, fraction = self._between(requests)
        plain = self.profile.plain
        return (1 - fraction) * plain[low] + fraction * plain[high] + self.profile.per_token * context

    def speculating(self, requests: int, extra: np.ndarray, context: int = 0, prompts: bool = False) -> np.ndarray:
        """Seconds, float64 [N], of steps with the choice of guesses, the heads' work and ``extra`` int [N] more rows
        than requests, some of them of ``prompts``: such steps are not padded."""
        low, high, share = self._between(requests)
        added = (1 - share) * self._added[low] + share * self._added[high]
        host = (
            float(np.interp(requests, self.profile.requests, self.profile.choosing)) if self.profile.choosing else 0.0
        )
        return self.plain(requests, context) + self.scale * (host + self._at(extra, added, high, not prompts))

    def are_full(self, requests: int, extra: np.ndarray) -> np.ndarray:
        """Of decoding steps with so many more rows, bool: whether no bucket has room for more guesses. A step that
        fills none may be padded to twice its requests."""
        high = self._between(requests)[1]
        rows, edges = extra + self.profile.requests[high] - 1, self._edges
        return (extra == 0) | (edges[np.minimum(np.searchsorted(edges, rows), len(edges) - 1)] == rows)

    def prefilling(self, requests: int, extra: np.ndarray, context: int = 0, before: int = 0) -> np.ndarray:
        """The same without the heads' work: rows of prompts, with ``before`` tokens before them, beside those of
        ``requests``."""
        low, high, share = self._between(requests)
        added = (1 - share) * self._added[low] + share * self._added[high]
        seconds = self.scale * self._at(extra, added - added[0], high, False) + self.profile.per_pair * extra * before
        return self.plain(requests, context) + self.prompt_scale * seconds

    def learn(self, predicted: float, measured: float, requests: int, extra: int, is_speculating: bool) -> None:
        """Take a step's predicted and measured seconds. What goes for all steps is learned sooner than what goes for
        steps with guesses of this size alone; steps without come in long runs, and are what the others must beat."""
        if measured > _DISTURBED * predicted:
            return
        ratio = min(2.0, max(0.5, measured / predicted))
        self.scale *= ratio**_RATE
        low, high, share = self._between(requests)
        nearest = high if share > 0.5 else low
        if is_speculating:
            place = min(bisect_left(self.profile.extra, extra + self._start(nearest)), len(self.profile.extra) - 1)
            self._raw_added[nearest, place] *= ratio**_RATE_OF_GUESSES
        else:
            self._raw_plain[nearest] *= ratio**_RATE_OF_PLAIN
        self._believe()

    def learn_prompts(self, predicted: float, measured: float) -> None:
        """Take a step with rows of prompts; the next of the same prompt will be much like it."""
        ratio = min(2.0, max(0.5, measured / predicted))
        self.prompt_scale = min(10.0, max(0.1, self.prompt_scale * ratio**_RATE_OF_PROMPTS))

    def _between(self, requests: int) -> tuple[int, int, float]:
        """The measured numbers of requests around this one, and where between them it lies."""
        sizes = self.profile.requests
        high = min(bisect_left(sizes, requests), len(sizes) - 1)
        low = high if sizes[high] <= requests or self.profile.steps else max(0, high - 1)
        if low == high:
            return low, high, 0.0
        return low, high, float(np.log(requests / sizes[low]) / np.log(sizes[high] / sizes[low]))

    def _start(self, place: int) -> int:
        """Where in the profile's rows those of steps without further rows are."""
        return self.profile.requests[place] - 1 if self.profile.steps else 0

    def _at(self, extra: np.ndarray, added: np.ndarray, place: int, is_padded: bool) -> np.ndarray:
        edges, rows = self._edges, extra + self._start(place)
        beyond = np.maximum(rows - edges[-1], 0)
        slope = (added[-1] - added[0]) / max(edges[-1] - self._start(place), 1)
        if self.profile.steps and is_padded:
            return added[np.minimum(np.searchsorted(edges, rows), len(edges) - 1)] + beyond * slope
        return np.interp(rows, edges, added) + beyond * slope
