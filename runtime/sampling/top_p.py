"""Top-k, top-p and min-p over a shared-out vocabulary: the smallest logit a row may still draw.

A filter keeps the tokens whose logit is at least a *border*; tokens that tie with the border are kept. Filters
apply in transformers' order (top-k, then top-p of what is left, then min-p). Usually the border is proven by the
candidates that travelled; otherwise a bounded search over float values finds it with scalar gathers.
Legend: N rows, V local vocabulary, S ranks, M merged candidates.
"""

from dataclasses import dataclass

import torch

from euryale.parallel import vocabulary
from euryale.parallel.vocabulary import VocabShard


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What all ranks said of each row. ``best_values``, ``best_ids`` [S, N]; ``log_total``, ``entropy``, ``top``
    float32 [N]; ``candidate_values``, ``candidate_ids`` [N, M], largest first; ``floor`` float32 [N]: no token
    above it is missing among the candidates."""

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
        """One gather of every rank's columns: maximum, sum of exp, first moment, best score, candidates."""
        packed = vocabulary.pack(columns, ids)
        floats, tokens = vocabulary.unpack(shard.group.all_gather(packed), len(columns))
        tops, sums, moments, best_values = (f.double() for f in floats[:4])
        top = tops.max(dim=0).values
        # A rank whose shard is all padding says -inf, 0, 0.
        factors = torch.where(tops == -torch.inf, 0.0, (tops - top).exp())
        total = (sums * factors).sum(dim=0)
        log_total = top + total.log()
        entropy = log_total - (moments * factors).sum(dim=0) / total
        values = torch.stack(floats[4:]) if floats[4:] else torch.empty(0, *top.shape, device=top.device)
        floor = torch.full_like(top, -torch.inf).float()
        if len(values):
            if len(values) < shard.length:
                floor = values[-1].max(dim=0).values  # the smallest candidate of the rank whose list ends highest
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


def thresholds(shard: VocabShard, scaled: torch.Tensor, merged: Merged, params) -> tuple[torch.Tensor, torch.Tensor]:
    """The border of each row, float32 [N] (-inf: every token may be drawn), and whether all tokens at or above it
    are among the candidates, bool [N]."""
    values = merged.candidate_values.double()
    weights = (values - merged.log_total.double()[:, None]).exp()
    border = torch.full_like(merged.top, -torch.inf)
    mass = torch.ones_like(border, dtype=torch.float64)
    has_k, has_p = params.filtered & (params.top_k > 0), params.filtered & (params.top_p < 1)
    if bool(has_k.any()):
        border_k = _top_k_border(shard, scaled, merged, params.top_k, has_k)
        border = torch.where(has_k, border_k, border)
        inside = torch.where(values >= border[:, None], weights, 0).sum(dim=1)
        inside = _exact_mass(shard, scaled, merged, border, inside, has_k & has_p)
        mass = torch.where(has_k, inside, mass)
    if bool(has_p.any()):
        border_p = _top_p_border(shard, scaled, merged, params.top_p.double() * mass, weights, has_p)
        border = torch.where(has_p, torch.maximum(border, border_p), border)
    border_m = torch.where(params.min_p > 0, merged.top + params.min_p.log(), -torch.inf)
    border = torch.maximum(border, border_m)
    border = torch.where(params.filtered, border, -torch.inf)
    return border, ~params.filtered | (border > merged.floor) | (merged.floor == -torch.inf)


def _top_k_border(shard, scaled, merged: Merged, top_k: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The k-th largest logit of each row."""
    place = (top_k - 1).clamp(0, merged.candidate_values.shape[1] - 1)
    found = merged.candidate_values.gather(1, place[:, None])[:, 0]
    # A token that did not travel is at most the floor, so it cannot push a border at or above the floor up.
    unproven = wanted & ((found < merged.floor) | (top_k > merged.candidate_values.shape[1]))
    unproven &= top_k < shard.vocab_size
    found = torch.where(top_k >= shard.vocab_size, -torch.inf, found)
    if not bool(unproven.any()):
        return found
    searched = _search(shard, scaled, top_k.double(), lambda at_least: at_least.double())
    return torch.where(unproven, searched, found)


def _top_p_border(shard, scaled, merged: Merged, needed, weights, wanted: torch.Tensor) -> torch.Tensor:
    """The logit of the token with which the largest tokens reach the mass ``needed`` (of the whole row's)."""
    before = weights.cumsum(dim=1) - weights
    last = (before < needed[:, None]).sum(dim=1).clamp(min=1) - 1
    found = merged.candidate_values.gather(1, last[:, None])[:, 0]
    reached = weights.sum(dim=1) >= needed
    unproven = wanted & ((found < merged.floor) | (~reached & (merged.floor > -torch.inf)))
    if not bool(unproven.any()):
        return found
    share = (scaled.double() - merged.log_total.double()[:, None]).exp()
    searched = _search(shard, scaled, needed, lambda at_least: torch.where(at_least, share, 0))
    return torch.where(unproven, searched, found)


def _exact_mass(shard, scaled, merged: Merged, border, inside, wanted: torch.Tensor) -> torch.Tensor:
    """Share of each row at or above ``border``: from the candidates where they hold all of it, else summed."""
    if not bool((wanted & (border <= merged.floor)).any()):
        return inside
    share = (scaled.double() - merged.log_total.double()[:, None]).exp()
    local = torch.where(scaled >= border[:, None], share, 0).sum(dim=1)
    return shard.group.all_gather(local).sum(dim=0)


def _search(shard: VocabShard, scaled: torch.Tensor, needed: torch.Tensor, measure) -> torch.Tensor:
    """The largest float32 border of each row whose tokens at or above it measure at least ``needed``.

    ``measure`` turns a bool [N, V] into the float64 [N, V] whose sum counts. Floats are searched in their
    order as integers, so 32 halvings find the exact value.
    """
    low = torch.full_like(needed, _order(torch.tensor(-torch.inf)).item(), dtype=torch.int64)
    high = torch.full_like(low, _order(torch.tensor(torch.inf)).item())
    for _ in range(32):  # invariant: low is enough, high is not
        middle = (low + high) // 2
        at_least = scaled >= _value(middle)[:, None]
        enough = shard.group.all_gather(measure(at_least).sum(dim=1)).sum(dim=0) >= needed
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return _value(low)


def _order(x: torch.Tensor) -> torch.Tensor:
    """Float32 as int64 in the same order."""
    bits = x.view(torch.int32).to(torch.int64)
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def _value(order: torch.Tensor) -> torch.Tensor:
    """Inverse of ``_order``."""
    bits = torch.where(order >= 0, order, -order - 2**31)
    return bits.to(torch.int32).view(torch.float32)
