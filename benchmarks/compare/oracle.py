"""transformers as the oracle: its greedy answers, and the proof that a mismatch is a tie.

Rows of a matrix product change in the last bits with the number of rows, so two right implementations may choose
differently where two tokens score the same within that rounding, and nowhere else.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Tie:
    """Two answers part at ``position``: the logits of the two tokens are ``gap`` apart, while the same logits
    computed in two ways (all rows at once, row by row) differ by up to ``discrepancy``."""

    position: int
    gap: float
    discrepancy: float

    @property
    def is_proven(self) -> bool:
        return self.gap < 2 * self.discrepancy


class Oracle:
    """A transformers model of a directory, in ``dtype``, greedy."""

    def __init__(self, directory: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True).eval()
        self.model.generation_config.do_sample = False

    def greedy(self, prompt: list[int], max_tokens: int, ignore_eos: bool = False, **options) -> list[int]:
        """The answer's tokens, the end-of-sequence token included."""
        return self.greedy_batch([prompt], max_tokens, ignore_eos, **options)[0]

    @torch.inference_mode()
    def greedy_batch(
        self, prompts: list[list[int]], max_tokens: int, ignore_eos: bool = False, **options
    ) -> list[list[int]]:
        """The answers' tokens, padded with 0 behind end-of-sequence tokens to the longest."""
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
    def explain(self, prompt: list[int], a: list[int], b: list[int]) -> Tie | None:
        """Where and how closely two answers part; None if they are the same."""
        if a == b:
            return None
        position = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        if position >= min(len(a), len(b)):
            return Tie(position, float("inf"), 0.0)  # one stopped although all tokens agree: no tie
        past = torch.tensor([prompt + a[:position]])
        whole = self.model(past).logits[0, -1].double()
        cached = self.model(past[:, :-1], use_cache=True)
        single = self.model(past[:, -1:], past_key_values=cached.past_key_values).logits[0, -1].double()
        gap = float((whole[a[position]] - whole[b[position]]).abs())
        return Tie(position, gap, float((whole - single).abs().max()))
