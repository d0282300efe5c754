"""Reference implementation of decoding in plain PyTorch: token by token, tree node by tree node."""

import numpy as np
import torch

from euryale.kernels.sample.noise import gumbel, stream_key
from euryale.scheduler.sampling_params import SamplingParams


def adjusted(
    logits: torch.Tensor, params: SamplingParams, prompt: list[int], answer: list[int], ends: set[int]
) -> torch.Tensor:
    """The textbook's formulas for logits [V] after a prompt and an answer; ``ends``: the end-of-sequence tokens."""
    logits = logits.clone()
    for token, bias in params.logit_bias:
        logits[token] += bias
    for token in {*prompt, *answer}:
        value = logits[token]
        logits[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    for token in set(answer):
        logits[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty
    if len(answer) < params.min_tokens:
        logits[list({*params.stop_token_ids, *ends})] = -torch.inf
    return logits


def drawn(logits: torch.Tensor, params: SamplingParams, position: int, sample: int = 0) -> int:
    """The token of adjusted logits [V] at a position of the answer."""
    if not params.temperature:
        return int(logits.argmax())
    scores = logits / params.temperature
    if params.top_k:
        scores[scores < scores.topk(params.top_k).values[-1]] = -torch.inf
    key = torch.tensor(stream_key(params.seed, sample, position))
    return int((scores + gumbel(key, torch.arange(len(scores)))).argmax())


def decode(model, prompt: np.ndarray, params: SamplingParams, ends: set[int], sample: int = 0):
    """One answer by transformers: its tokens, and the raw logits [T, V] they come from."""
    answer, raw = [], []
    while True:
        with torch.no_grad():
            raw.append(model(torch.tensor([[*prompt.tolist(), *answer]])).logits[0, -1])
        logits = adjusted(raw[-1], params, prompt.tolist(), answer, ends)
        answer.append(drawn(logits, params, len(answer), sample))
        ended = answer[-1] in params.stop_token_ids or (answer[-1] in ends and not params.ignore_eos)
        if ended or len(answer) == params.max_tokens:
            return answer, torch.stack(raw)


def typical_by_hand(logits, tokens, parents, params, position):
    """The rule of typical acceptance, node by node: returns the accepted nodes and the bonus token."""
    p = (logits.double() / params.temperature).softmax(-1)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
    good, path_logp, paths = {0: True}, {0: 0.0}, {0: []}
    for node, parent in enumerate(parents, start=1):
        child = p[parent, tokens[node]]
        limit = min(params.epsilon, params.delta * float(torch.exp(-entropy[parent])))
        good[node] = good[parent] and float(child) > limit
        path_logp[node] = path_logp[parent] + float(child.log())
        paths[node] = [*paths[parent], node]
    best = max((n for n in good if good[n]), key=lambda n: (len(paths[n]), path_logp[n]))
    noise = gumbel(torch.tensor(stream_key(params.seed, 0, position + len(paths[best]))), torch.arange(logits.shape[1]))
    return paths[best], int((logits[best] / params.temperature + noise).argmax())
