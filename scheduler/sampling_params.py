"""Sampling parameters of one request: validated once, plain data afterwards.

This file does not know where parameters come from (wire, JSONL, Python) nor how tokens are drawn.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from euryale.client.params import RULES


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. ``seed`` is an unsigned 64-bit
    integer. ``acceptance`` is "exact" (tokens distributed as without speculation) or "typical" (Medusa paper,
    section 2.3.1; lossy), with ``epsilon`` (posterior threshold) and ``delta`` (posterior alpha) for the latter.
    ``stop_token_ids`` end the answer and are part of its tokens, as the end-of-sequence token is; ``stop``
    strings end it and are not part of its text. ``speculation`` False decodes this request one token a step.
    No token is changed by these: ``priority``, requests with lower numbers are served earlier; ``latency_target``, the
    milliseconds that a token may take on average (0: any): guesses go first to requests that are behind it;
    ``cache_salt``, requests share pages, and learn from each other what follows what, only with those of the same salt.

    What follows changes or reports logits, at every node of a tree with the node's own path as history;
    ``runtime/sampling/logits_processors.py`` has the formulas and their order. ``presence_penalty`` and
    ``frequency_penalty`` weigh the answer's tokens, ``repetition_penalty`` (1: off) the prompt's too; ``logit_bias``
    are pairs of a token id and what is added to its logit. Before ``min_tokens`` output tokens neither the
    end-of-sequence tokens nor ``stop_token_ids`` are drawn. ``logprobs`` N (None: off) reports the log-probability of
    every output token and of the N likeliest in its place, by the model's raw logits; ``prompt_logprobs`` likewise of
    the prompt's tokens. ``n`` answers are drawn independently; whoever hands requests to the scheduler makes one of
    each.

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
        for name in _FRACTIONS:
            object.__setattr__(self, name, _float32(getattr(self, name)))
        object.__setattr__(self, "logit_bias", tuple((token, _float32(bias)) for token, bias in self.logit_bias))
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), not {self.min_tokens}: lower it or "
                "raise max_tokens"
            )

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on the tokens so far."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @cached_property
    def is_bare(self) -> bool:
        """Whether tokens of the model's own distribution are all that is asked for, so that no history is kept."""
        wants_more = self.has_penalties or self.logit_bias or self.min_tokens
        return not wants_more and self.logprobs is None and self.prompt_logprobs is None

    @property
    def is_filtered(self) -> bool:
        """Whether drawing leaves out some tokens."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


_FRACTIONS = tuple(f.name for f in dataclasses.fields(SamplingParams) if isinstance(f.default, float))
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(SamplingParams)}


def _float32(value: float) -> float:
    return float(np.float32(value))


def _check_bias(pairs: tuple[tuple[int, float], ...]) -> None:
    """Pairs follow the rule of the map that they stand for, and name no token twice."""
    tokens = [pair[0] for pair in pairs] if all(isinstance(p, tuple) and len(p) == 2 for p in pairs) else None
    RULES["logit_bias"].check("logit_bias", pairs if tokens is None else dict(pairs))
    if len(set(tokens)) < len(tokens):
        raise ValueError("logit_bias names a token twice: give one number for each")
