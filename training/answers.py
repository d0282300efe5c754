"""The backbone's own greedy answers to prompts of the corpus: what its heads learn from and are judged on.

Medusa paper (arXiv 2401.10774), section 2.3.2, self-distillation. Shape suffixes: S answers, L positions.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM


def spaced_prompts(stream: np.ndarray, count: int, length: int) -> torch.Tensor:
    """``count`` evenly spaced pieces of the stream, int64 [count, length]; ValueError if it is too short."""
    room = len(stream) - length
    if room < count:
        raise ValueError(f"{len(stream)} tokens are too few for {count} prompts of {length}: ask for fewer")
    return torch.from_numpy(np.stack([stream[i * room // count :][:length] for i in range(count)]).astype(np.int64))


@torch.no_grad()
def continue_greedily(backbone: LlamaForCausalLM, prompts_SL: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Int64 [S, prompt] -> [S, prompt + new_tokens], in the backbone's dtype; nothing stops at end of text."""
    output = backbone(prompts_SL, use_cache=True, logits_to_keep=1)
    tokens = [prompts_SL]
    for _ in range(new_tokens):
        tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
        if len(tokens) <= new_tokens:
            output = backbone(tokens[-1], past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    return torch.cat(tokens, dim=1)


def write_answers(
    backbone: LlamaForCausalLM, prompts_SL: torch.Tensor, new_tokens: int, work: Path, part_size: int = 256
) -> np.ndarray:
    """Prompts with their answers, uint16 [S, prompt + new_tokens], written part by part to ``work/answers``: a
    killed run goes on at the first part that is missing."""
    folder = work / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for i, part in enumerate(prompts_SL.split(part_size)):
        path = folder / f"{i:04}.npy"
        if not path.exists():
            tokens = continue_greedily(backbone, part, new_tokens).numpy().astype(np.uint16)
            np.save(path.with_suffix(".tmp.npy"), tokens)
            path.with_suffix(".tmp.npy").replace(path)
            print(f"answers {i * part_size + len(part)}/{len(prompts_SL)}", flush=True)
        parts.append(np.load(path))
    return np.concatenate(parts)


def shuffled(answers_SL: np.ndarray, batch: int, step: int, seed: int) -> np.ndarray:
    """Batch ``step`` of the endless, seeded order of answers: int64 [batch, L]; a function of its arguments alone."""
    if len(answers_SL) < batch:
        raise ValueError(f"{len(answers_SL)} answers are too few for a batch of {batch}: write more")
    epoch, index = divmod(step, len(answers_SL) // batch)
    order = np.random.default_rng((seed, epoch)).permutation(len(answers_SL))
    return answers_SL[order[index * batch : (index + 1) * batch]].astype(np.int64)
