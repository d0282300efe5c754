"""One step on one rank: run the plan's rows, accept, commit, guess again. A transaction: until ``commit`` the
cache is as it was, so a step that fails leaves nothing behind.
"""

import zlib
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from euryale.kernels import backend
from euryale.kernels.threads import one_for_torch
from euryale.runtime.kv_cache import KVCache
from euryale.runtime.model.decoder import Decoder
from euryale.runtime.model.medusa_heads import MedusaHeads
from euryale.runtime.sampling.acceptance import decide
from euryale.runtime.sampling.logits_processors import process_logits
from euryale.runtime.sampling.logprobs import StepLogprobs
from euryale.runtime.step_batch import StepBatch
from euryale.runtime.step_graphs import StepGraphs
from euryale.scheduler.step_plan import StepPlan
from euryale.scheduler.step_result import HeadCandidates, SegmentResult


@dataclass(frozen=True)
class Outcome:
    """What a step found, on the device: ``next_tokens`` int32 [N] after the decided rows, ``last`` int32 [B], the row
    where each segment's walk ended, ``candidates`` int32 [2, K, W, k] after it (see ``MedusaHeads``), or None. Nothing
    but ``logprobs``, if no segment samples."""

    next_tokens: torch.Tensor | None = None
    last_rows: torch.Tensor | None = None
    candidates: torch.Tensor | None = None
    logprobs: StepLogprobs | None = None

    def to_host(self) -> list[np.ndarray]:
        """The three as arrays, in one copy; waits for the device."""
        tensors = [t for t in (self.next_tokens, self.last_rows, self.candidates) if t is not None]
        if self.last_rows.device.type != "cpu":
            whole = torch.cat([t.flatten() for t in tensors]).cpu()
            parts = whole.split([t.numel() for t in tensors])
            tensors = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
        return [t.numpy() for t in tensors] + [None] * (3 - len(tensors))


@dataclass
class StepRunner:
    """A rank's model, heads and cache. ``num_candidates``: how many guesses per head the tree can use. ``digest``
    sums up every token this rank has accepted; ranks whose digests differ have diverged."""

    decoder: Decoder
    heads: MedusaHeads | None
    cache: KVCache
    num_candidates: int
    graphs: StepGraphs | None = None  # None: every kernel is called from Python
    digest: int = 0

    @torch.inference_mode()
    def start(self, plan: StepPlan) -> tuple[StepBatch, Outcome | None] | None:
        """Have the device execute the plan; on a GPU it may still be at it when this returns. ``finish`` the step
        before the next is started."""
        if not plan.segments:
            return None
        with one_for_torch() if backend.is_compiled(self.decoder.shard.group.device) else nullcontext():
            return self._start(plan)

    def _start(self, plan: StepPlan) -> tuple[StepBatch, Outcome | None]:
        step = self.graphs.prepare(plan) if self.graphs else None
        if step is None:
            batch = StepBatch.of(plan, self.cache.page_size, self.decoder.shard.group.device)
            return batch, self._conclude(batch, self._hidden_states(batch))
        kind = step.batch.host.kind
        if kind.is_decode and kind.is_plain:
            return step.batch, Outcome(*step.run(self._decode))
        (hidden_RD,) = step.run(lambda batch: (self._hidden_states(batch),))
        return step.batch, self._conclude(step.batch, hidden_RD)

    def finish(self, started: tuple[StepBatch, Outcome | None] | None) -> list[SegmentResult]:
        """One result per segment that has one, in the plan's order, the same on every rank."""
        if started is None or started[1] is None:
            return []
        self.decoder.shard.group.wait_for_device()
        batch, outcome = started
        results = self._results(batch, outcome) if batch.host.emitting else []
        return outcome.logprobs.add_to(batch, results) if outcome.logprobs else results

    def run(self, plan: StepPlan) -> list[SegmentResult]:
        """Execute the plan and wait for its results."""
        return self.finish(self.start(plan))

    def _hidden_states(self, batch: StepBatch) -> torch.Tensor:
        return self.decoder.transform(self.decoder.embed_tokens(batch.tokens), self.cache, batch.metadata)

    def _decode(self, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """A whole decoding step, without a look at what it finds."""
        outcome = self._conclude(batch, self._hidden_states(batch))
        return outcome.next_tokens, outcome.last_rows, outcome.candidates

    def _conclude(self, batch: StepBatch, hidden_RD: torch.Tensor) -> Outcome | None:
        """What follows the last layer; None if nothing is asked for but its K/V."""
        if not batch.host.emitting:
            self.cache.commit(batch.metadata.slots)
            logprobs = (
                StepLogprobs.prepare(self.decoder, hidden_RD, None, batch)
                if batch.host.kind.has_logits_inputs
                else None
            )
            return logprobs and Outcome(logprobs=logprobs)
        decided_ND = hidden_RD if batch.decided is None else hidden_RD[batch.decided]
        logits_NV, logprobs = self.decoder.logits(decided_ND), None
        if batch.host.kind.has_logits_inputs:
            logprobs = StepLogprobs.prepare(self.decoder, hidden_RD, logits_NV, batch)
            logits_NV = process_logits(self.decoder.shard, logits_NV, batch)
        accepted = decide(self.decoder.shard, logits_NV, batch)
        self.cache.commit(accepted.commit_slots)
        candidates = None
        if self.heads is not None and batch.host.kind.wants_head_candidates:
            after = accepted.last_rows if batch.wanted is None else accepted.last_rows[batch.wanted]
            candidates = self.heads.candidates(hidden_RD, after, self.num_candidates)
        return Outcome(accepted.next_tokens, accepted.last_rows, candidates, logprobs)

    def _results(self, batch: StepBatch, outcome: Outcome) -> list[SegmentResult]:
        next_tokens, last, candidates = outcome.to_host()
        tokens, parents, starts = (
            batch.host.arrays["tokens"],
            batch.host.arrays["parent_rows"],
            batch.metadata.row_starts,
        )
        results, place = [], 0
        for i in batch.host.emitting:
            segment, row, path = batch.host.segments[i], int(last[i]), []
            bonus = next_tokens[row if batch.host.decided_at is None else batch.host.decided_at[row]]
            while parents[row] >= 0:
                path.append(row)
                row = int(parents[row])
            path.reverse()
            emitted = [*tokens[path].tolist(), int(bonus)]
            root, guesses = starts[i] + segment.num_new_tokens - 1, None
            if candidates is not None and segment.wants_head_candidates:
                mine = candidates[:, :, i if batch.wanted is None else place].copy()  # its place is written over
                guesses = HeadCandidates(ids=mine[1], logits=mine[0].view(np.float32))
                place += 1
            results.append(
                SegmentResult(tokens=emitted, accepted_nodes=[r - root for r in path], head_candidates=guesses)
            )
            self.digest = zlib.crc32(np.asarray(emitted, dtype=np.int32).tobytes(), self.digest)
        return results
