"""Sampling parameters of one request, validated once.

This file does not know where parameters come from (wire, JSONL, Python) nor how tokens are drawn. CONTRIBUTING.md says
what a new parameter touches.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from euryale.client.params import ACCEPTANCE_RULES, RULES

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
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if isinstance(value, str | list):
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name, rule in RULES.items():
            value = getattr(self, name)
            if value is _DEFAULTS[name]:
                continue
            if name == "logit_bias":
                _check_bias(value)
            else:
                rule.check(name, value)
        for name in _FLOATS:
            object.__setattr__(self, name, _float32(getattr(self, name)))
        object.__setattr__(self, "logit_bias", tuple((token, _float32(bias)) for token, bias in self.logit_bias))
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), not {self.min_tokens}: lower it or "
                "raise max_tokens"
            )

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


_FLOATS = tuple(f.name for f in dataclasses.fields(SamplingParams) if isinstance(f.default, float))
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(SamplingParams)}


def _float32(value: float) -> float:
    return float(np.float32(value))


def _check_bias(pairs: tuple[tuple[int, float], ...]) -> None:
    """Check the pairs by the rule of the map that they stand for. Raises ValueError for a token that occurs twice."""
    tokens = [pair[0] for pair in pairs] if all(isinstance(p, tuple) and len(p) == 2 for p in pairs) else None
    RULES["logit_bias"].check("logit_bias", pairs if tokens is None else dict(pairs))
    if tokens and len(set(tokens)) < len(tokens):
        raise ValueError("logit_bias names a token twice: give one number for each")
