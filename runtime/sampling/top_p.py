"""Top-k, top-p and min-p over a sharded vocabulary: finds the smallest logit that a row may draw.

A filter keeps the tokens whose logit is at least a *threshold*, ties included. Filters apply in transformers' order:
top-k, then top-p of the rest, then min-p. Usually the gathered candidates determine the threshold. Otherwise a bounded
search over float values finds it with scalar gathers. Legend: N rows, V local vocabulary, S ranks, M merged candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from euryale.parallel import vocabulary
from euryale.parallel.vocabulary import VocabShard

if TYPE_CHECKING:  # sampler.py imports this file
    from euryale.runtime.sampling.sampler import RowParams


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The gathered reductions of each row's logits.

    ``best_values`` float32 and ``best_ids`` int64 [S, N]: each rank's best noisy logit. ``top`` float32 [N]: the
    largest logit. ``log_total`` float32 [N]: the logarithm of the sum of exp. ``entropy`` float32 [N], in nats.
    ``candidate_values`` float32 and ``candidate_ids`` int64 [N, M], largest first. ``floor`` float32 [N]: every token
    above it is among the candidates.
    """

    best_values: torch.Tensor
    best_ids: torch.Tensor
    top: torch.Tensor
    log_total: torch.Tensor
    entropy: torch.Tensor
    candidate_values: torch.Tensor
    candidate_ids: torch.Tensor
    floor: torch.Tensor

    @classmethod
    def gather(cls, shard: VocabShard, columns: list[torch.Tensor], ids: list[torch.Tensor]) -> "Merged":
        """Gather and merge every rank's columns.

        ``columns``: maximum, sum of exp, sum of l * exp, best score, then candidates, each float32 [N]. ``ids``: of the
        best score, then of the candidates, each int64 [N].
        """
        packed = vocabulary.pack(columns, ids)
        floats, tokens = vocabulary.unpack(shard.group.all_gather(packed), len(columns))
        tops, sums, moments, best_values = (f.double() for f in floats[:4])
        top = tops.max(dim=0).values
        # A rank whose shard is all padding sends -inf, 0, 0.
        factors = torch.where(tops == -torch.inf, 0.0, (tops - top).exp())
        total = (sums * factors).sum(dim=0)
        log_total = top + total.log()
        entropy = log_total - (moments * factors).sum(dim=0) / total
        values = torch.stack(floats[4:]) if floats[4:] else torch.empty(0, *top.shape, device=top.device)
        floor = torch.full_like(top, -torch.inf).float()
        if len(values):
            if len(values) < shard.length:
                floor = values[-1].max(dim=0).values  # the largest of the ranks' smallest candidates
            values, order = values.flatten(0, 1).T.sort(dim=1, descending=True, stable=True)
            candidate_ids = torch.stack(tokens[1:]).flatten(0, 1).T.gather(1, order)
        else:
            values = candidate_ids = torch.empty(len(top), 0, device=top.device)
        return cls(
            best_values=best_values.float(),
            best_ids=tokens[0],
            top=top.float(),
            log_total=log_total.float(),
            entropy=entropy.float(),
            candidate_values=values,
            candidate_ids=candidate_ids,
            floor=floor,
        )


def thresholds(
    shard: VocabShard, scaled: torch.Tensor, merged: Merged, params: "RowParams"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's threshold and whether the candidates contain all tokens at or above it: float32 and bool [N].

    ``scaled`` float32 [N, V]: logits divided by temperature. A threshold of -inf keeps every token.
    """
    values = merged.candidate_values.double()
    weights = (values - merged.log_total.double()[:, None]).exp()
    threshold = torch.full_like(merged.top, -torch.inf)
    mass = torch.ones_like(threshold, dtype=torch.float64)
    has_k, has_p = params.filtered & (params.top_k > 0), params.filtered & (params.top_p < 1)
    if bool(has_k.any()):
        threshold_k = _top_k_threshold(shard, scaled, merged, params.top_k, has_k)
        threshold = torch.where(has_k, threshold_k, threshold)
        inside = torch.where(values >= threshold[:, None], weights, 0).sum(dim=1)
        inside = _exact_mass(shard, scaled, merged, threshold, inside, has_k & has_p)
        mass = torch.where(has_k, inside, mass)
    if bool(has_p.any()):
        threshold_p = _top_p_threshold(shard, scaled, merged, params.top_p.double() * mass, weights, has_p)
        threshold = torch.where(has_p, torch.maximum(threshold, threshold_p), threshold)
    threshold_m = torch.where(params.min_p > 0, merged.top + params.min_p.log(), -torch.inf)
    threshold = torch.maximum(threshold, threshold_m)
    threshold = torch.where(params.filtered, threshold, -torch.inf)
    return threshold, ~params.filtered | (threshold > merged.floor) | (merged.floor == -torch.inf)


def _top_k_threshold(
    shard: VocabShard, scaled: torch.Tensor, merged: Merged, top_k: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Return the k-th largest logit of each row that is ``wanted``, bool [N]."""
    place = (top_k - 1).clamp(0, merged.candidate_values.shape[1] - 1)
    found = merged.candidate_values.gather(1, place[:, None])[:, 0]
    # A token that is not a candidate is at most the floor, so it cannot raise a threshold at or above the floor.
    unknown = wanted & ((found < merged.floor) | (top_k > merged.candidate_values.shape[1]))
    unknown &= top_k < shard.vocab_size
    found = torch.where(top_k >= shard.vocab_size, -torch.inf, found)
    if not bool(unknown.any()):
        return found
    searched = _search(shard, scaled, top_k.double(), lambda at_least: at_least.double())
    return torch.where(unknown, searched, found)


def _top_p_threshold(
    shard: VocabShard,
    scaled: torch.Tensor,
    merged: Merged,
    needed: torch.Tensor,
    weights: torch.Tensor,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """Return the logit at which the largest tokens reach a total probability of ``needed`` float64 [N].

    ``weights`` float64 [N, M]: probabilities of the candidates. ``wanted`` bool [N]: rows that need a threshold.
    """
    before = weights.cumsum(dim=1) - weights
    last = (before < needed[:, None]).sum(dim=1).clamp(min=1) - 1
    found = merged.candidate_values.gather(1, last[:, None])[:, 0]
    reached = weights.sum(dim=1) >= needed
    unknown = wanted & ((found < merged.floor) | (~reached & (merged.floor > -torch.inf)))
    if not bool(unknown.any()):
        return found
    probabilities = (scaled.double() - merged.log_total.double()[:, None]).exp()
    searched = _search(shard, scaled, needed, lambda at_least: torch.where(at_least, probabilities, 0))
    return torch.where(unknown, searched, found)


def _exact_mass(
    shard: VocabShard,
    scaled: torch.Tensor,
    merged: Merged,
    threshold: torch.Tensor,
    inside: torch.Tensor,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """Return the probability of all tokens at or above ``threshold`` [N]: float64 [N].

    That is ``inside``, the candidates' probability, if they contain all such tokens of the ``wanted`` rows. Otherwise
    it is summed over the ranks.
    """
    if not bool((wanted & (threshold <= merged.floor)).any()):
        return inside
    probabilities = (scaled.double() - merged.log_total.double()[:, None]).exp()
    local = torch.where(scaled >= threshold[:, None], probabilities, 0).sum(dim=1)
    return shard.group.all_gather(local).sum(dim=0)


def _search(
    shard: VocabShard,
    scaled: torch.Tensor,
    needed: torch.Tensor,
    measure: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return each row's largest float32 threshold with a measure of at least ``needed`` float64 [N].

    ``measure`` maps the tokens at or above a threshold, bool [N, V], to float64 [N, V], whose sum over all ranks is the
    measure. A binary search over floats, ordered as integers, finds the exact value in 32 steps.
    """
    low = torch.full_like(needed, _order(torch.tensor(-torch.inf)).item(), dtype=torch.int64)
    high = torch.full_like(low, _order(torch.tensor(torch.inf)).item())
    for _ in range(32):  # invariant: low satisfies ``needed``, high does not
        middle = (low + high) // 2
        at_least = scaled >= _value(middle)[:, None]
        enough = shard.group.all_gather(measure(at_least).sum(dim=1)).sum(dim=0) >= needed
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return _value(low)


def _order(x: torch.Tensor) -> torch.Tensor:
    """Map float32 to int64 in the same order."""
    bits = x.view(torch.int32).to(torch.int64)
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def _value(order: torch.Tensor) -> torch.Tensor:
    """Inverse of ``_order``."""
    bits = torch.where(order >= 0, order, -order - 2**31)
    return bits.to(torch.int32).view(torch.float32)
