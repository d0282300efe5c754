"""Accepts draft tokens by the rule of each request, ``exact`` or ``typical``, mixed in one batch.

* exact: at each tree node, from the root down, draw the model's next token. Continue at the child with that token. If
  there is none, the drawn token is the bonus token. The tree is fixed before the draw, so answers are distributed
  exactly as without speculation, at every temperature.
* typical (Medusa paper, section 2.3.1): a draft token is acceptable if p(token) > min(epsilon, delta * exp(-entropy)).
  The longest path of acceptable tokens wins, and the most probable one of equally long paths. The bonus token is drawn
  as in exact.

Legend: R rows, N decided rows, B segments, V local vocabulary, T draft tokens under typical acceptance.
"""

from dataclasses import dataclass

import numpy as np
import torch

from euryale.kernels.accept import accept
from euryale.parallel import vocabulary
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.sampling.sampler import draw
from euryale.runtime.step_batch import StepBatch


@dataclass(frozen=True, kw_only=True)
class AcceptanceResult:
    """``next_tokens`` int32 [N]: the model's next token after each decided row. ``last_rows`` int32 [B]: each segment's
    last accepted row. ``commit_slots`` int64 [R]: slots of the rows to commit, -1 for others."""

    next_tokens: torch.Tensor
    last_rows: torch.Tensor
    commit_slots: torch.Tensor


def decide(shard: VocabShard, logits_NV: torch.Tensor, batch: StepBatch) -> AcceptanceResult:
    """Accept draft tokens and draw bonus tokens.

    ``logits_NV``: processed logits of the batch's decided rows (see StepBatch), this rank's vocabulary shard.
    Every rank returns the same result. Collective: raises RankLost.
    """
    good = scores = pairs = None
    if batch.rules is None:
        # Greedy rows need no distribution, because typical acceptance at temperature 0 accepts only the argmax.
        tokens = vocabulary.argmax(shard, logits_NV)
    else:
        typical = _TypicalRows.of(batch)
        if typical is not None:
            pairs = torch.stack([typical.parents_at, batch.tokens[typical.rows]], dim=1)
        drawn = draw(shard, logits_NV, batch.rules, pairs)
        tokens = drawn.tokens
        if typical is not None:
            assert drawn.child_logp is not None
            assert drawn.entropy is not None
            good, scores = typical.judge(batch, drawn.child_logp, drawn.entropy)
    next_R = tokens
    if batch.decided_at is not None:
        next_R = torch.where(batch.decided_at >= 0, tokens[batch.decided_at.clamp(min=0)], -1)
    last_rows, commit_slots = accept(batch.metadata, batch.tokens, next_R, good, scores)
    return AcceptanceResult(next_tokens=tokens, last_rows=last_rows, commit_slots=commit_slots)


@dataclass(frozen=True)
class _TypicalRows:
    """The draft tokens of requests with typical acceptance.

    ``rows`` int64 [T]; ``parents_at`` int64 [T], their parents' indices among the decided rows; ``epsilon`` and
    ``delta`` float32 [T].
    """

    rows: torch.Tensor
    parents_at: torch.Tensor
    epsilon: torch.Tensor
    delta: torch.Tensor

    @classmethod
    def of(cls, batch: StepBatch) -> "_TypicalRows | None":
        """Collect the rows of ``batch``; None if there are none."""
        rules = {i: batch.host.segments[i].params for i in batch.host.emitting}
        chosen = [i for i, r in rules.items() if r.acceptance == "typical" and r.temperature > 0]
        starts, device = batch.metadata.row_starts, batch.tokens.device
        pairs = [
            (i, row) for i in chosen for row in range(starts[i] + batch.host.segments[i].num_new_tokens, starts[i + 1])
        ]
        if not pairs:
            return None
        owners, rows = np.asarray(pairs, dtype=np.int64).T.copy()
        parents = batch.host.arrays["parent_rows"][rows]
        places = parents if batch.host.decided_at is None else batch.host.decided_at[parents]
        table = np.asarray([(rules[i].epsilon, rules[i].delta) for i in owners], dtype=np.float32)
        on_device = (torch.from_numpy(x).to(device) for x in (rows, places, table[:, 0].copy(), table[:, 1].copy()))
        return cls(*on_device)

    def judge(
        self, batch: StepBatch, child_logp: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whether each row is acceptable, int8 [R], -1 for rows of other requests, and path scores float32 [R].

        ``child_logp`` float32 [T]: log-probabilities of the draft tokens. ``entropy`` float32 [N]: of the decided rows,
        in nats. A row's score is the log-probability of the path from the root to it.
        """
        limit = torch.minimum(self.epsilon, self.delta * torch.exp(-entropy[self.parents_at]))
        good = torch.full_like(batch.tokens, -1, dtype=torch.int8)
        good[self.rows] = (child_logp.exp() > limit).to(torch.int8)
        own = torch.zeros_like(batch.tokens, dtype=torch.float32)
        own[self.rows] = child_logp
        # Sums from each row up to the root.
        scores, row = torch.zeros_like(own), torch.arange(len(own), device=own.device)
        for _ in range(batch.metadata.max_depth):
            scores += torch.where(row >= 0, own[row.clamp(min=0)], 0.0)
            row = torch.where(row >= 0, batch.metadata.parent_rows[row.clamp(min=0)], -1)
        return good, scores
