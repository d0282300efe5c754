"""Next tokens drawn over a shared-out vocabulary.

Each rank reduces its own shard of a row to a few numbers, one small gather merges them, and every rank decides
from the gathered numbers only, so that all decide the same. Legend: N rows, V local vocabulary, S ranks, C
candidates a rank sends.
"""

from dataclasses import dataclass

import numpy as np
import torch

from euryale.parallel import vocabulary
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.noise import gumbel, stream_key
from euryale.runtime.nucleus import Merged, thresholds
from euryale.scheduler.params import SamplingParams

NUM_CANDIDATES = 64


@dataclass(frozen=True, kw_only=True)
class RowParams:
    """Sampling parameters of each row. ``temperature`` float32 [N] (0: greedy), ``top_k`` int64 [N] (0: off),
    ``top_p``, ``min_p`` float32 [N], ``keys`` int64 [N] (noise of the row's position); ``filtered`` bool [N], rows
    that are sampled under top-k, top-p or min-p."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    keys: torch.Tensor
    filtered: torch.Tensor
    is_filtered: bool  # some row is filtered
    is_open: bool  # some row is sampled and not filtered

    @classmethod
    def build(cls, rows: list[tuple[SamplingParams, int]], device: torch.device) -> "RowParams":
        """From each row's parameters and its position in the answer."""
        params = [p for p, _ in rows]
        filtered = [p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params]

        def column(values: list, dtype) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values, dtype=dtype)).to(device)

        return cls(
            temperature=column([p.temperature for p in params], np.float32),
            top_k=column([p.top_k for p in params], np.int64),
            top_p=column([p.top_p for p in params], np.float32),
            min_p=column([p.min_p for p in params], np.float32),
            keys=column([stream_key(p.seed, 0, position) for p, position in rows], np.int64),
            filtered=column(filtered, bool),
            is_filtered=any(filtered),
            is_open=any(p.temperature > 0 and not f for p, f in zip(params, filtered, strict=True)),
        )


@dataclass(frozen=True, kw_only=True)
class Draw:
    """``tokens`` int64 [N], the next token of each row by the exact rule; ``child_logp`` float32 [N] (or None),
    log-probability of the asked-for token at temperature, -inf if a filter excludes it; ``entropy`` float32 [N]
    in nats."""

    tokens: torch.Tensor
    child_logp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


def draw(shard: VocabShard, logits_NV: torch.Tensor, params: RowParams, asked: torch.Tensor | None) -> Draw:
    """Draw each row's next token (design: Gumbel-max; argmax at temperature 0), in one gather unless a nucleus
    is wider than the candidates that travel.

    ``asked`` int64 [M, 2], or None: (row, token) pairs whose log-probability under the row is wanted.
    """
    is_greedy = params.temperature == 0
    scaled = logits_NV / torch.where(is_greedy, 1.0, params.temperature)[:, None]
    columns, ids = _local_columns(shard, scaled, params, is_greedy)
    if asked is not None:
        asked_values = shard.group.all_gather(shard.pick(scaled[asked[:, 0]], asked[:, 1])).max(dim=0).values
    merged = Merged.gather(shard, columns, ids)
    tokens = vocabulary.best(merged.best_values, merged.best_ids)
    borders = None
    if params.is_filtered:
        borders, is_proven = thresholds(shard, scaled, merged, params)
        keys = params.keys
        if bool(is_proven.all()):
            scores = merged.candidate_values + gumbel(keys[:, None], merged.candidate_ids)
            scores = torch.where(merged.candidate_values >= borders[:, None], scores, -torch.inf)
            picked = vocabulary.best(scores.T, merged.candidate_ids.T)
        else:
            noisy = scaled + gumbel(keys[:, None], torch.arange(shard.length, device=keys.device) + shard.offset)
            picked = vocabulary.argmax(shard, torch.where(scaled >= borders[:, None], noisy, -torch.inf))
        tokens = torch.where(params.filtered, picked, tokens)
    if asked is None:
        return Draw(tokens=tokens)
    logp = asked_values - merged.log_total[asked[:, 0]]
    if borders is not None:
        logp = torch.where(asked_values >= borders[asked[:, 0]], logp, -torch.inf)
    return Draw(tokens=tokens, child_logp=logp, entropy=merged.entropy)


def _local_columns(
    shard: VocabShard, scaled: torch.Tensor, params: RowParams, is_greedy: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What this rank says of its shard: maximum, sum of exp, sum of l * exp, best score and its id, candidates."""
    top = scaled.max(dim=1).values
    shift = torch.where(top == -torch.inf, 0.0, top)
    weights = (scaled - shift[:, None]).exp()
    first_moment = torch.where(weights > 0, scaled * weights, 0.0).sum(dim=1)
    scores = scaled
    if params.is_open:
        noise_keys, which = params.keys.unique(return_inverse=True)  # one noise vector per depth of a request
        noise = gumbel(noise_keys[:, None], torch.arange(shard.length, device=scaled.device) + shard.offset)
        scores = torch.where(is_greedy[:, None], scaled, scaled + noise[which])
    best_values, best_ids = vocabulary.local_best(shard, scores)
    columns, ids = [top, weights.sum(dim=1), first_moment, best_values], [best_ids]
    if params.is_filtered:
        values, tokens = vocabulary.local_top_k(shard, scaled, NUM_CANDIDATES)
        columns += values.unbind(1)
        ids += tokens.unbind(1)
    return columns, ids
