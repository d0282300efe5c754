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
from euryale.runtime.sampling.sampler import draw
from euryale.runtime.step_batch import StepBatch


@dataclass(frozen=True, kw_only=True)
class AcceptanceResult:
    """``next_tokens`` int32 [N], what the model says after each decided row; ``last`` int32 [B], the row where each
    segment's walk ended; ``kept`` int64 [R], the slots of the rows that become permanent, -1 for others."""

    next_tokens: torch.Tensor
    last_rows: torch.Tensor
    commit_slots: torch.Tensor


def decide(shard: VocabShard, logits_NV: torch.Tensor, batch: StepBatch) -> AcceptanceResult:
    """Accept drafts and draw bonus tokens from the logits [N, V] of the batch's decided rows."""
    good = scores = asked = None
    if batch.rules is None:
        # Greedy needs no distribution; typical at temperature 0 accepts the argmax and nothing else.
        tokens = vocabulary.argmax(shard, logits_NV)
    else:
        typical = _TypicalRows.of(batch)
        if typical is not None:
            asked = torch.stack([typical.parents_at, batch.tokens[typical.rows]], dim=1)
        drawn = draw(shard, logits_NV, batch.rules, asked)
        tokens = drawn.tokens
        if typical is not None:
            good, scores = typical.judge(batch, drawn.child_logp, drawn.entropy)
    next_R = tokens
    if batch.decided is not None:
        next_R = torch.where(batch.decided_at >= 0, tokens[batch.decided_at.clamp(min=0)], -1)
    last_rows, commit_slots = accept(batch.metadata, batch.tokens, next_R, good, scores)
    return AcceptanceResult(next_tokens=tokens, last_rows=last_rows, commit_slots=commit_slots)


@dataclass(frozen=True)
class _TypicalRows:
    """The draft rows of requests that ask for typical acceptance: ``rows`` int64 [D], ``parents_at`` int64 [D], their
    parents' places among the decided rows, ``epsilon`` and ``delta`` float32 [D]."""

    rows: torch.Tensor
    parents_at: torch.Tensor
    epsilon: torch.Tensor
    delta: torch.Tensor

    @classmethod
    def of(cls, batch: StepBatch) -> "_TypicalRows | None":
        """None if there are none."""
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
        """Whether these rows are good enough, int8 [R], -1 for others, and the log-probability of the path that ends at
        each row, float32 [R], from ``child_logp`` [D] and the decided rows' ``entropy`` [N]."""
        limit = torch.minimum(self.epsilon, self.delta * torch.exp(-entropy[self.parents_at]))
        good = torch.full_like(batch.tokens, -1, dtype=torch.int8)
        good[self.rows] = (child_logp.exp() > limit).to(torch.int8)
        own = torch.zeros_like(batch.tokens, dtype=torch.float32)
        own[self.rows] = child_logp
        # Sum from the row up to the root.
        scores, row = torch.zeros_like(own), torch.arange(len(own), device=own.device)
        for _ in range(batch.metadata.max_depth):
            scores += torch.where(row >= 0, own[row.clamp(min=0)], 0.0)
            row = torch.where(row >= 0, batch.metadata.parent_rows[row.clamp(min=0)], -1)
        return good, scores
