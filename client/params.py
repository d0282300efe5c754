"""Types of the sampling parameters of ``Client.generate``; docs/protocol.md explains them."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict


class GenerateParams(TypedDict, total=False):
    """All parameters are optional; None means the server's default."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    min_tokens: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    prompt_logprobs: int | None
    n: int | None
    acceptance: Literal["exact", "typical"] | None
    epsilon: float | None
    delta: float | None
    speculation: bool | None
    priority: int | None
    latency_target: float | None
    cache_salt: str | None
