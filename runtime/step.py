"""One step on one rank: run the plan's rows, accept, commit, guess again. A transaction: until ``commit`` the
cache is as it was, so a step that fails leaves nothing behind.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from euryale.kernels.graph import Graphs
from euryale.runtime.acceptance import decide
from euryale.runtime.batch import StepBatch
from euryale.runtime.kv_cache import KVCache
from euryale.runtime.medusa import MedusaHeads
from euryale.runtime.model import Decoder
from euryale.scheduler.plan import StepPlan
from euryale.scheduler.scheduler import SegmentResult


@dataclass
class StepRunner:
    """A rank's model, heads and cache. ``num_candidates``: how many guesses per head the tree can use. ``digest``
    sums up every token this rank has accepted; ranks whose digests differ have diverged."""

    decoder: Decoder
    heads: MedusaHeads | None
    cache: KVCache
    num_candidates: int
    graphs: Graphs | None = None  # None: every kernel is called from Python
    digest: int = 0

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[SegmentResult]:
        """Execute the plan; one result per sampling segment, in the plan's order, the same on every rank."""
        if not plan.segments:
            return []
        batch = StepBatch.build(plan, self.cache.page_size, self.decoder.shard.group.device)
        hidden_RD = self._hidden_states(batch)
        if not batch.sampling:
            self.cache.commit(batch.geometry, batch.certain)
            return []
        accepted = decide(self.decoder.shard, self.decoder.logits(hidden_RD[batch.decided]), batch)
        self.cache.commit(batch.geometry, torch.cat([batch.certain, accepted.rows]))
        guesses = self._guess(batch, hidden_RD, accepted.last)
        return self._results(batch, accepted, guesses)

    def _hidden_states(self, batch: StepBatch) -> torch.Tensor:
        x_RD, group = self.decoder.embed_tokens(batch.tokens), self.decoder.shard.group
        if self.graphs is None:
            return self.decoder.transform(x_RD, self.cache, batch.geometry)
        hidden_RD, status = self.graphs(x_RD, batch.geometry)
        group.check(status)
        return hidden_RD

    def _guess(self, batch: StepBatch, hidden_RD: torch.Tensor, last: torch.Tensor) -> dict[int, np.ndarray]:
        """The heads' candidates [heads, k] after the last accepted row of every segment that wants them."""
        wanted = [i for i in batch.sampling if batch.segments[i].wants_candidates]
        if self.heads is None or not wanted:
            return {}
        ids = self.heads.candidates(hidden_RD[last[wanted]], self.num_candidates)
        return dict(zip(wanted, ids.to(torch.int32).cpu().numpy(), strict=True))

    def _results(self, batch: StepBatch, accepted, guesses: dict[int, np.ndarray]) -> list[SegmentResult]:
        tokens, segment_of_row = batch.tokens.tolist(), batch.geometry.segment_of_row.tolist()
        last, rows = accepted.last.tolist(), accepted.rows.tolist()
        bonus, decided_at = accepted.bonus.tolist(), batch.decided_at.tolist()
        paths: dict[int, list[int]] = {i: [] for i in batch.sampling}
        for row in rows:  # rows ascend, and parents come before their children
            paths[segment_of_row[row]].append(row)
        results = []
        for i, path in paths.items():
            root = batch.geometry.row_starts[i] + batch.segments[i].num_certain - 1
            emitted = [tokens[row] for row in path] + [bonus[decided_at[last[i]]]]
            results.append(
                SegmentResult(tokens=emitted, accepted_nodes=[r - root for r in path], candidates=guesses.get(i))
            )
            self.digest = zlib.crc32(np.asarray(emitted, dtype=np.int32).tobytes(), self.digest)
        return results
