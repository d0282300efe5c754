"""Sampling parameters of one request, validated once.

This file does not know where parameters come from (wire, JSONL, Python) nor how tokens are drawn. CONTRIBUTING.md says
what a new parameter touches.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeGuard

import numpy as np

ACCEPTANCE_RULES = ("exact", "typical")
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300  # entries, as OpenAI's API allows; they are part of every plan
MAX_SAMPLES = 128
MAX_SALT_LENGTH = 256
# The parameters that every rank reads in the sampler, with their numpy types in a plan.
PLAN_TYPES = {
    "temperature": "<f4",
    "top_k": "<i4",
    "top_p": "<f4",
    "min_p": "<f4",
    "seed": "<u8",
    "acceptance": "<i4",  # index into ACCEPTANCE_RULES
    "epsilon": "<f4",
    "delta": "<f4",
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded. ``docs/protocol.md`` explains each parameter to users.

    Decoding:

    * ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off.
    * ``seed``: unsigned 64-bit integer.
    * ``acceptance``: "exact" (tokens are distributed as without speculation) or "typical" (Medusa paper, section 2.3.1;
      lossy). ``epsilon`` (posterior threshold) and ``delta`` (posterior alpha) belong to "typical".
    * ``max_tokens``, ``stop_token_ids``, the end-of-sequence tokens (unless ``ignore_eos``) and ``stop`` strings end
      the output. An end token is part of the output's tokens; a stop string is not part of its text.
    * ``n``: answers, drawn independently. Whoever hands requests to the scheduler makes one request for each.

    Scheduling, which changes no token:

    * ``speculation`` False decodes one token a step.
    * ``priority``: requests with lower numbers are served first.
    * ``latency_target``: mean milliseconds per output token; 0 is none. Requests behind their target get draft tokens
      first.
    * ``cache_salt``: requests share cached pages and n-gram statistics only with requests of the same salt.

    Logits, for which ``runtime/sampling/logits_processors.py`` has the formulas and their order. In a tree, each node
    uses the history of its own path.

    * ``presence_penalty`` and ``frequency_penalty`` count the output's tokens; ``repetition_penalty`` (1: off) the
      prompt's too.
    * ``logit_bias``: pairs of a token id and what is added to its logit.
    * ``min_tokens``: neither end-of-sequence tokens nor ``stop_token_ids`` are drawn before this many output tokens.
    * ``logprobs`` N (None: off) reports the log-probability of every output token and of the N likeliest tokens in its
      place, from the model's unchanged logits. ``prompt_logprobs`` does so for the prompt's tokens.

    Floats are rounded to float32, as all ranks see them. Raises ValueError, with a remedy, if a value is out of range.
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
    latency_target: float = 0.0
    cache_salt: str = ""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        _check_types(self)
        for name in _FLOATS:
            object.__setattr__(self, name, _float32(getattr(self, name)))
        object.__setattr__(self, "logit_bias", tuple((token, _float32(bias)) for token, bias in self.logit_bias))
        _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_range("temperature", self.temperature, 0, 100)
        if 0 < self.temperature < 1e-3:
            raise ValueError(
                f"temperature {self.temperature} is too small: use 0 for greedy decoding or at least 0.001"
            )
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 1e-45 and at most 1, not {self.top_p}")
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("seed", self.seed, 0, 2**64 - 1)
        if self.acceptance not in ACCEPTANCE_RULES:
            raise ValueError(f"acceptance must be one of {', '.join(ACCEPTANCE_RULES)}, not {self.acceptance!r}")
        _check_range("epsilon", self.epsilon, 0, 1)
        _check_range("delta", self.delta, 0, 1)
        _check_range("priority", self.priority, -(2**31), 2**31 - 1)
        _check_range("latency_target", self.latency_target, 0, 1e9)
        if len(self.cache_salt) > MAX_SALT_LENGTH:
            raise ValueError(f"cache_salt has at most {MAX_SALT_LENGTH} characters, not {len(self.cache_salt)}")
        if len(self.stop) > MAX_STOP_STRINGS or any(not 0 < len(s) <= MAX_STOP_LENGTH for s in self.stop):
            raise ValueError(f"stop takes at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters")
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_bias(self.logit_bias)
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens must be between 0 and max_tokens ({self.max_tokens}), not {self.min_tokens}: lower it or "
                "raise max_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), 0, MAX_LOGPROBS)
        _check_range("n", self.n, 1, MAX_SAMPLES)

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on the tokens before."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @cached_property
    def is_bare(self) -> bool:
        """Whether the request needs no logits inputs: nothing changes its logits and no logprobs are reported."""
        changes_logits = self.has_penalties or self.logit_bias or self.min_tokens
        return not changes_logits and self.logprobs is None and self.prompt_logprobs is None

    @property
    def is_filtered(self) -> bool:
        """Whether top_k, top_p or min_p exclude tokens from being drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @cached_property
    def plan_values(self) -> tuple[float, ...]:
        """The parameters of PLAN_TYPES as numbers, in its order."""
        values = {name: getattr(self, name) for name in PLAN_TYPES}
        values["acceptance"] = ACCEPTANCE_RULES.index(self.acceptance)
        return tuple(values.values())


@lru_cache(maxsize=4096)  # the values of a request are the same in all its steps
def params_of_plan(*values: float) -> SamplingParams:
    """Return parameters with these ``plan_values``, and defaults for what a plan does not have."""
    fields: dict[str, Any] = dict(zip(PLAN_TYPES, values, strict=True))
    fields["acceptance"] = ACCEPTANCE_RULES[fields["acceptance"]]
    return SamplingParams(**fields)


PARAMETER_NAMES = frozenset(f.name for f in dataclasses.fields(SamplingParams))
_FLOATS = tuple(f.name for f in dataclasses.fields(SamplingParams) if isinstance(f.default, float))
_LISTS: dict[str, tuple[Callable[[Any], bool], str]] = {  # check of an item, and what the list must be
    "stop": (lambda item: isinstance(item, str), "a list of strings"),
    "stop_token_ids": (lambda item: _is_int(item), "a list of token ids"),
    "logit_bias": (
        lambda item: isinstance(item, tuple) and len(item) == 2 and _is_int(item[0]) and _is_finite(item[1]),
        "a map from token ids to finite numbers",
    ),
}


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    # math.isfinite raises OverflowError for an integer beyond all floats.
    return (_is_int(value) and abs(value) < 2**64) or (isinstance(value, float) and math.isfinite(value))


def _float32(value: float) -> float:
    return float(np.float32(value))


def _check_types(params: SamplingParams) -> None:
    for field in dataclasses.fields(SamplingParams):
        value, default = getattr(params, field.name), field.default
        if isinstance(default, bool):
            fits, kind = isinstance(value, bool), "of type bool"
        elif isinstance(default, float):
            fits, kind = _is_finite(value), "a finite number"
        elif isinstance(default, tuple):
            is_item, kind = _LISTS[field.name]
            fits = isinstance(value, tuple) and all(map(is_item, value))
        elif isinstance(default, str):
            fits, kind = isinstance(value, str), "of type str"
        else:
            fits, kind = _is_int(value) or value is default is None, "of type int"
        if not fits:
            raise ValueError(f"{field.name} must be {kind}, not {repr(value)[:200]}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {value}")


def _check_bias(pairs: tuple[tuple[int, float], ...]) -> None:
    if len(pairs) > MAX_LOGIT_BIAS:
        raise ValueError(f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens, not {len(pairs)}")
    if len({token for token, _ in pairs}) < len(pairs):
        raise ValueError("logit_bias has a token twice: give one number for each token")
    for _, bias in pairs:
        _check_range("a number of logit_bias", bias, -100, 100)
