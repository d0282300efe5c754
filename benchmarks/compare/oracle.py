"""transformers as the oracle: its greedy answers, and the check whether two answers differ by rounding only.

The last bits of a matrix product depend on its number of rows. Two correct implementations may therefore select
different tokens where two logits differ by no more than that rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Tie:
    """The first difference of two answers, at ``position``.

    The logits of the two tokens are ``gap`` apart. The same logits computed in two ways (all rows at once, and the last
    row alone) differ by up to ``discrepancy``.
    """

    position: int
    gap: float
    discrepancy: float

    @property
    def is_rounding(self) -> bool:
        """Whether the gap is within the rounding of both logits."""
        return self.gap < 2 * self.discrepancy


class Oracle:
    """A transformers model with greedy decoding."""

    def __init__(self, directory: str, dtype: torch.dtype = torch.float32) -> None:
        """Load the model in ``directory`` in ``dtype``."""
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True).eval()
        self.model.generation_config.do_sample = False

    def greedy(self, prompt: list[int], max_tokens: int, ignore_eos: bool = False, **options: Any) -> list[int]:
        """Return the tokens of the answer with its end-of-sequence token; ``options`` are those of ``generate``."""
        return self.greedy_batch([prompt], max_tokens, ignore_eos, **options)[0]

    @torch.inference_mode()
    def greedy_batch(
        self, prompts: list[list[int]], max_tokens: int, ignore_eos: bool = False, **options: Any
    ) -> list[list[int]]:
        """Return the tokens of the answers, padded with 0 after end-of-sequence tokens to the longest."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options = {"max_new_tokens": max_tokens, "pad_token_id": 0} | options
        if ignore_eos:
            options["eos_token_id"] = None
            saved, self.model.generation_config.eos_token_id = self.model.generation_config.eos_token_id, None
        try:
            out = self.model.generate(ids, attention_mask=mask, do_sample=False, **options)
        finally:
            if ignore_eos:
                self.model.generation_config.eos_token_id = saved
        return out[:, width:].tolist()

    @torch.inference_mode()
    def compare(self, prompt: list[int], a: list[int], b: list[int]) -> Tie | None:
        """Return the first difference of two answers to ``prompt``; None if they are equal."""
        if a == b:
            return None
        position = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        if position >= min(len(a), len(b)):
            return Tie(position, float("inf"), 0.0)  # one answer is a prefix of the other: not rounding
        past = torch.tensor([prompt + a[:position]])
        whole = self.model(past).logits[0, -1].double()
        cached = self.model(past[:, :-1], use_cache=True)
        single = self.model(past[:, -1:], past_key_values=cached.past_key_values).logits[0, -1].double()
        gap = float((whole[a[position]] - whole[b[position]]).abs())
        return Tie(position, gap, float((whole - single).abs().max()))
