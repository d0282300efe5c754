"""Which drafts of a step are accepted: ``exact`` and ``typical``, chosen per request and mixed in one batch.

* exact: walk down from the root; at each node draw the model's own next token; go to the child that has it, or
  stop. The drawn token that has no child is the bonus token. The tree is fixed before the draw, so the answer is
  distributed exactly as without speculation, at every temperature.
* typical (Medusa paper, section 2.3.1): a child is good enough if p(child) > min(epsilon, delta * exp(-entropy));
  the longest path of such children wins, of equally long ones the likelier. The bonus token is drawn as in exact.
"""

from dataclasses import dataclass

import numpy as np
import torch

from euryale.kernels.accept import accept
from euryale.parallel import vocabulary
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.batch import StepBatch
from euryale.runtime.sampling import Draw, RowParams, draw


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """``last`` int64 [B], the row where each segment's walk ended; ``rows`` int64 [n], the accepted draft rows in
    order; ``bonus`` int64 [N], the token drawn at each decided row."""

    last: torch.Tensor
    rows: torch.Tensor
    bonus: torch.Tensor


def decide(shard: VocabShard, logits_NV: torch.Tensor, batch: StepBatch) -> Accepted:
    """Accept drafts and draw bonus tokens from the logits [N, V] of the batch's decided rows."""
    geometry = batch.geometry
    params = [batch.segments[i].params for i in batch.sampling]
    is_typical = any(p.acceptance == "typical" for p in params)
    drafts, parents_at = batch.drafts, batch.parents_at
    if all(p.temperature == 0 for p in params):
        # Greedy needs no distribution; typical at temperature 0 accepts the argmax and nothing else.
        drawn, is_typical = Draw(tokens=vocabulary.argmax(shard, logits_NV)), False
    else:
        asked = torch.stack([parents_at, batch.tokens[drafts]], dim=1) if is_typical else None
        drawn = draw(shard, logits_NV, _row_params(batch, logits_NV.device), asked)
    fits = torch.zeros(geometry.num_rows, dtype=torch.bool, device=logits_NV.device)
    scores = torch.zeros(geometry.num_rows, device=logits_NV.device)
    fits[drafts] = drawn.tokens[parents_at] == batch.tokens[drafts]
    if is_typical:
        _apply_typical(batch, drawn, drafts, parents_at, fits, scores)
    last, accepted = accept(geometry, batch.roots, fits, scores)
    return Accepted(last=last, rows=accepted.nonzero()[:, 0], bonus=drawn.tokens)


def _apply_typical(batch: StepBatch, drawn: Draw, drafts, parents_at, fits, scores) -> None:
    """Overwrite ``fits`` and ``scores`` of the drafts whose request asks for typical acceptance, in place."""
    rules = [batch.segments[int(i)].params for i in batch.geometry.segment_of_row[drafts].tolist()]
    table = np.asarray([(r.acceptance == "typical" and r.temperature > 0, r.epsilon, r.delta) for r in rules])
    chosen, epsilon, delta = torch.from_numpy(table.astype(np.float32).reshape(-1, 3)).to(fits.device).unbind(1)
    limit = torch.minimum(epsilon, delta * torch.exp(-drawn.entropy[parents_at]))
    good = drawn.child_logp.exp() > limit
    fits[drafts] = torch.where(chosen > 0, good, fits[drafts])
    own = torch.zeros_like(scores)
    own[drafts] = torch.where(chosen > 0, drawn.child_logp, 0.0)
    # A path's log-probability: sum its nodes', from the node up to the root.
    row = torch.arange(len(scores), device=scores.device)
    for _ in range(batch.geometry.max_depth):
        scores += torch.where(row >= 0, own[row.clamp(min=0)], 0.0)
        row = torch.where(row >= 0, batch.geometry.parent_rows[row.clamp(min=0)], -1)


def _row_params(batch: StepBatch, device: torch.device) -> RowParams:
    rows, starts, depths = [], batch.geometry.row_starts, batch.geometry.depths.tolist()
    for i in batch.sampling:
        segment = batch.segments[i]
        for row in range(starts[i] + segment.num_certain - 1, starts[i + 1]):
            rows.append((segment.params, segment.position + depths[row]))
    return RowParams.build(rows, device)
