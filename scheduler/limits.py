"""What the model and its memory allow, and whether a request fits into that."""

from dataclasses import dataclass

from euryale.scheduler.request import Request


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """What the model and its memory allow. Tokens, rows (tokens of one step) and pages are counts."""

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
                f"({self.max_num_seqs}), or a step could not give every running request a row"
            )

    def max_pages(self, request: Request) -> int:
        """Pages that the request can ever need."""
        return -(-(len(request.prompt) + request.params.max_tokens) // self.page_size)

    def check(self, request: Request) -> None:
        """Raise ValueError, saying how to mend it, if the request could never run."""
        length, wanted = len(request.prompt), request.params.max_tokens
        if length == 0:
            raise ValueError("the prompt is empty: give at least one token")
        low, high = int(request.prompt.min()), int(request.prompt.max())
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")
        named = [*request.params.stop_token_ids, *(token for token, _ in request.params.logit_bias)]
        if beyond := [token for token in named if not 0 <= token < self.vocab_size]:
            raise ValueError(f"token id {beyond[0]} of the parameters is outside the vocabulary of {self.vocab_size}")
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
