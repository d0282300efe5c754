"""Draws next tokens over a sharded vocabulary.

Each rank reduces its shard of a row to a few numbers, and one small gather merges them. Every rank draws from the
gathered numbers only, so all draw the same tokens. Legend: N rows, V local vocabulary, M (row, token) pairs.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from euryale.kernels.sample import sample
from euryale.kernels.sample.noise import gumbel, stream_key
from euryale.kernels.top_k import values_and_ids
from euryale.parallel import vocabulary
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.sampling.top_p import Merged, thresholds
from euryale.scheduler.sampling_params import SamplingParams

NUM_CANDIDATES = 64  # largest logits of a filtered row that each rank sends


@dataclass(frozen=True, kw_only=True)
class RowParams:
    """Sampling parameters of each row.

    ``temperature`` float32 [N] (0: greedy), ``top_k`` int64 [N] (0: off), ``top_p`` float32 [N] (1: off), ``min_p``
    float32 [N] (0: off), ``is_filtered`` int8 [N]: 1 for rows that are sampled with one of these filters. ``keys``
    int64 [N]: keys of the rows' noise. ``is_plain``: no row is filtered, and only the drawn tokens are needed.
    """

    ARRAYS: ClassVar = ("temperature", "keys", "top_k", "top_p", "min_p", "is_filtered")

    temperature: torch.Tensor
    keys: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    is_filtered: torch.Tensor
    is_plain: bool

    @property
    def filtered(self) -> torch.Tensor:
        """Rows that are sampled with top-k, top-p or min-p: bool [N]."""
        return self.is_filtered.bool()


def row_arrays(rows: list[tuple[SamplingParams, int, int]]) -> dict[str, np.ndarray]:
    """Return the arrays of RowParams on the host, from parameters, sample index and output index of each row."""
    params = [p for p, _, _ in rows]
    return {
        "temperature": np.asarray([p.temperature for p in params], dtype=np.float32),
        "keys": np.asarray([stream_key(p.seed, *at) if p.temperature else 0 for p, *at in rows], dtype=np.int64),
        "top_k": np.asarray([p.top_k for p in params], dtype=np.int64),
        "top_p": np.asarray([p.top_p for p in params], dtype=np.float32),
        "min_p": np.asarray([p.min_p for p in params], dtype=np.float32),
        "is_filtered": np.asarray([p.is_filtered for p in params], dtype=np.int8),
    }


@dataclass(frozen=True, kw_only=True)
class Draw:
    """``tokens`` int32 [N]: each row's next token, drawn from the filtered distribution.

    ``child_logp`` float32 [M]: log-probability of each pair's token under its row, at the row's temperature, -inf if a
    filter excludes it. ``entropy`` float32 [N]: of the unfiltered distribution, in nats. Both None without pairs.
    """

    tokens: torch.Tensor
    child_logp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


def draw(shard: VocabShard, logits_NV: torch.Tensor, params: RowParams, pairs: torch.Tensor | None) -> Draw:
    """Draw each row's next token: Gumbel-max sampling, argmax at temperature 0.

    One gather suffices unless a filter keeps more tokens than the candidates that ranks send. ``pairs`` int64 [M, 2],
    or None: (row, token) pairs whose log-probability is wanted.
    """
    best = sample(logits_NV, params.temperature, params.keys, shard.num_valid, shard.offset)
    if params.is_plain and pairs is None:
        return Draw(tokens=vocabulary.merge(shard, best)[1, :, 0])
    logits_NV, is_greedy = shard.hide_padding(logits_NV), params.temperature == 0
    scaled = logits_NV / torch.where(is_greedy, 1.0, params.temperature)[:, None]
    filtered = params.filtered
    is_filtered = bool(filtered.any())
    if pairs is not None:
        pair_logits = shard.group.all_gather(shard.pick(scaled[pairs[:, 0]], pairs[:, 1])).max(dim=0).values
    merged = Merged.gather(shard, *_local_columns(shard, scaled, best, is_filtered))
    tokens = vocabulary.best(merged.best_values, merged.best_ids)
    threshold = None
    if is_filtered:
        threshold, is_complete = thresholds(shard, scaled, merged, params)
        keys = params.keys
        if bool(is_complete.all()):
            scores = merged.candidate_values + gumbel(keys[:, None], merged.candidate_ids)
            scores = torch.where(merged.candidate_values >= threshold[:, None], scores, -torch.inf)
            picked = vocabulary.best(scores.T, merged.candidate_ids.T)
        else:
            noisy = scaled + gumbel(keys[:, None], torch.arange(shard.length, device=keys.device) + shard.offset)
            picked = vocabulary.argmax(shard, torch.where(scaled >= threshold[:, None], noisy, -torch.inf))
        tokens = torch.where(filtered, picked, tokens)
    tokens = tokens.to(torch.int32)
    if pairs is None:
        return Draw(tokens=tokens)
    logp = pair_logits - merged.log_total[pairs[:, 0]]
    if threshold is not None:
        logp = torch.where(pair_logits >= threshold[pairs[:, 0]], logp, -torch.inf)
    return Draw(tokens=tokens, child_logp=logp, entropy=merged.entropy)


def _local_columns(
    shard: VocabShard, scaled: torch.Tensor, best: torch.Tensor, is_filtered: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Reduce this rank's shard to the columns of ``Merged.gather``: floats and ids, each [N].

    These are the maximum, sum of exp, sum of l * exp, best score and its id. Filtered rows add candidates.
    """
    top = scaled.max(dim=1).values
    shift = torch.where(top == -torch.inf, 0.0, top)
    weights = (scaled - shift[:, None]).exp()
    first_moment = torch.where(weights > 0, scaled * weights, 0.0).sum(dim=1)
    best_values, best_ids = values_and_ids(best)
    columns, ids = [top, weights.sum(dim=1), first_moment, best_values[:, 0]], [best_ids[:, 0]]
    if is_filtered:
        values, tokens = vocabulary.local_top_k(shard, scaled, NUM_CANDIDATES)
        columns += values.unbind(1)
        ids += tokens.unbind(1)
    return columns, ids
