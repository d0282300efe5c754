"""Limits of the model and its memory, and the check of a request against them."""

from dataclasses import dataclass

from euryale.scheduler.request import Request


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """Limits of the model and its memory. A row is one token of one step.

    ``max_model_len``: prompt and output tokens of a request. ``max_num_seqs``: running requests.
    ``max_num_batched_tokens``: rows of a step. ``num_pages``: KV pages of ``page_size`` tokens each. ``end_ids``: the
    end-of-sequence tokens. Raises ValueError if a step could not have a row for every running request.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    num_pages: int
    page_size: int
    end_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that a step has a row for every running request"
            )

    def max_pages(self, request: Request) -> int:
        """Return how many pages the request needs at its maximum length."""
        return -(-(len(request.prompt) + request.params.max_tokens) // self.page_size)

    def check(self, request: Request) -> None:
        """Raise ValueError, with a remedy, if the request could never run."""
        length, wanted = len(request.prompt), request.params.max_tokens
        if length == 0:
            raise ValueError("the prompt is empty: give at least one token")
        low, high = int(request.prompt.min()), int(request.prompt.max())
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")
        parameter_ids = [*request.params.stop_token_ids, *(token for token, _ in request.params.logit_bias)]
        if beyond := [token for token in parameter_ids if not 0 <= token < self.vocab_size]:
            raise ValueError(f"token id {beyond[0]} in the parameters is outside the vocabulary of {self.vocab_size}")
        if length + wanted > self.max_model_len:
            raise ValueError(
                f"{length} prompt tokens and max_tokens {wanted} exceed the model's {self.max_model_len} tokens: "
                f"shorten the prompt or ask for at most {max(self.max_model_len - length, 0)}"
            )
        if self.max_pages(request) > self.num_pages:
            raise ValueError(
                f"{length} prompt tokens and max_tokens {wanted} need {self.max_pages(request)} KV pages "
                f"and there are {self.num_pages}: ask for less or give the cache more memory"
            )
