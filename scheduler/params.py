"""Sampling parameters of one request: validated once, plain data afterwards.

This file does not know where parameters come from (wire, JSONL, Python) nor how tokens are drawn.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

ACCEPTANCE_RULES = ("exact", "typical")
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. ``seed`` is an unsigned 64-bit
    integer. ``acceptance`` is "exact" (tokens distributed as without speculation) or "typical" (Medusa paper,
    section 2.3.1; lossy), with ``epsilon`` (posterior threshold) and ``delta`` (posterior alpha) for the latter.
    ``stop_token_ids`` end the answer and are part of its tokens, as the end-of-sequence token is; ``stop``
    strings end it and are not part of its text. ``speculation`` False decodes this request one token a step.
    ``priority``: requests with lower numbers are served earlier; it changes no token.
    Fractions are rounded to float32, as all ranks see them.

    Raises ValueError, with the way to mend it, if a value is out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    acceptance: str = "exact"
    epsilon: float = 0.09
    delta: float = 0.3
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    speculation: bool = True
    priority: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("temperature", "top_p", "min_p", "epsilon", "delta"):
            object.__setattr__(self, name, float(np.float32(getattr(self, name))))
        _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_range("temperature", self.temperature, 0, 100)
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature {self.temperature} is too small to divide by: use 0 for greedy or >= 0.001")
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 (and 1e-45) and at most 1, not {self.top_p}")
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("seed", self.seed, 0, 2**64 - 1)
        if self.acceptance not in ACCEPTANCE_RULES:
            raise ValueError(f"acceptance must be one of {', '.join(ACCEPTANCE_RULES)}, not {self.acceptance!r}")
        _check_range("epsilon", self.epsilon, 0, 1)
        _check_range("delta", self.delta, 0, 1)
        _check_range("priority", self.priority, -(2**31), 2**31 - 1)
        if len(self.stop) > MAX_STOP_STRINGS or any(not 0 < len(s) <= MAX_STOP_LENGTH for s in self.stop):
            raise ValueError(f"stop takes at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters")

    @property
    def is_filtered(self) -> bool:
        """Whether drawing leaves out some tokens."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


PARAMETER_NAMES = frozenset(f.name for f in dataclasses.fields(SamplingParams))


def _check_types(params: SamplingParams) -> None:
    for field in dataclasses.fields(SamplingParams):
        value, default = getattr(params, field.name), field.default
        if isinstance(default, bool) or isinstance(value, bool):
            fits = isinstance(default, bool) and isinstance(value, bool)
        elif isinstance(default, float):
            fits = isinstance(value, int | float) and math.isfinite(value)
        elif isinstance(default, tuple):
            item = str if field.name == "stop" else int
            fits = isinstance(value, tuple) and all(isinstance(v, item) and not isinstance(v, bool) for v in value)
        else:
            fits = isinstance(value, type(default))
        if not fits:
            kind = "a finite number" if isinstance(default, float) else f"of type {type(default).__name__}"
            if isinstance(default, tuple):
                kind = "a list of strings" if field.name == "stop" else "a list of token ids"
            raise ValueError(f"{field.name} must be {kind}, not {value!r}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {value}")
