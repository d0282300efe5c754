"""One step on one rank: compute the plan's rows, accept draft tokens, commit, run the Medusa heads.

A step is a transaction: the cache does not change before ``commit``, so a failed step leaves no trace. Legend: R rows,
N decided rows, B segments, W segments that want head candidates, D hidden, V local vocabulary, K heads.
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
    """Results of a step, on the device.

    ``next_tokens`` int32 [N]: the next token of each decided row. ``last_rows`` int32 [B]: each segment's last accepted
    row. ``candidates`` int32 [2, K, W, k]: head candidates after these rows, packed as in ``MedusaHeads.candidates``.
    Only ``logprobs`` is set if no segment emits tokens.
    """

    next_tokens: torch.Tensor | None = None
    last_rows: torch.Tensor | None = None
    candidates: torch.Tensor | None = None
    logprobs: StepLogprobs | None = None

    def to_host(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Copy ``next_tokens``, ``last_rows`` and ``candidates`` to the host in one transfer, which waits for it."""
        tensors = [t for t in (self.next_tokens, self.last_rows, self.candidates) if t is not None]
        if tensors[0].device.type != "cpu":
            whole = torch.cat([t.flatten() for t in tensors]).cpu()
            parts = whole.split([t.numel() for t in tensors])
            tensors = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
        next_tokens, last_rows, *candidates = (t.numpy() for t in tensors)
        return next_tokens, last_rows, candidates[0] if candidates else None


StartedStep = tuple[StepBatch, Outcome | None]  # None: the step has no results


@dataclass
class StepRunner:
    """A rank's model, heads and cache. ``num_candidates``: head candidates per head that trees use.

    ``digest``: checksum of all tokens this rank has emitted; ranks whose digests differ have diverged.
    """

    decoder: Decoder
    heads: MedusaHeads | None
    cache: KVCache
    num_candidates: int
    graphs: StepGraphs | None = None  # None: every kernel is called from Python
    digest: int = 0

    @torch.inference_mode()
    def start(self, plan: StepPlan) -> StartedStep | None:
        """Start the plan on the device; None if it has no segments.

        A GPU may still be computing when this returns. Call ``finish`` before the next ``start``.
        """
        if not plan.segments:
            return None
        with one_for_torch() if backend.is_compiled(self.decoder.shard.group.device) else nullcontext():
            return self._start(plan)

    def _start(self, plan: StepPlan) -> StartedStep:
        step = self.graphs.prepare(plan) if self.graphs else None
        if step is None:
            batch = StepBatch.of(plan, self.cache.page_size, self.decoder.shard.group.device)
            return batch, self._conclude(batch, self._hidden_states(batch))
        kind = step.batch.host.kind
        if kind.is_decode and kind.is_plain:
            return step.batch, Outcome(*step.run(self._decode))
        (hidden_RD,) = step.run(lambda batch: (self._hidden_states(batch),))
        return step.batch, self._conclude(step.batch, hidden_RD)

    def finish(self, started: StartedStep | None) -> list[SegmentResult]:
        """Wait for a started step and return its results, the same on every rank.

        There is one per segment with ``has_result``, in the plan's order.
        """
        if started is None:
            return []
        batch, outcome = started
        if outcome is None:
            return []
        self.decoder.shard.group.wait_for_device()
        results = self._results(batch, outcome) if batch.host.emitting else []
        return outcome.logprobs.add_to(batch, results) if outcome.logprobs else results

    def run(self, plan: StepPlan) -> list[SegmentResult]:
        """Run the plan and return its results."""
        return self.finish(self.start(plan))

    def _hidden_states(self, batch: StepBatch) -> torch.Tensor:
        return self.decoder.transform(self.decoder.embed_tokens(batch.tokens), self.cache, batch.metadata)

    def _decode(self, batch: StepBatch) -> tuple[torch.Tensor | None, ...]:
        """Run a whole decoding step without reading its results, so that it can be recorded."""
        outcome = self._conclude(batch, self._hidden_states(batch))
        assert outcome is not None, "decoding steps emit tokens"
        return outcome.next_tokens, outcome.last_rows, outcome.candidates

    def _conclude(self, batch: StepBatch, hidden_RD: torch.Tensor) -> Outcome | None:
        """Run what follows the last layer; None if the plan asks for no results."""
        if not batch.host.emitting:
            self.cache.commit(batch.metadata.slots)
            logprobs = None
            if batch.host.kind.has_logits_inputs:
                logprobs = StepLogprobs.prepare(self.decoder, hidden_RD, None, batch)
            return Outcome(logprobs=logprobs) if logprobs else None
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
        """Results of the segments that emit tokens; updates the digest."""
        next_tokens, last_rows, candidates = outcome.to_host()
        tokens, parents = batch.host.arrays["tokens"], batch.host.arrays["parent_rows"]
        results, place = [], 0
        for i in batch.host.emitting:
            segment, row, path = batch.host.segments[i], int(last_rows[i]), []
            bonus = next_tokens[row if batch.host.decided_at is None else batch.host.decided_at[row]]
            while parents[row] >= 0:
                path.append(row)
                row = int(parents[row])
            path.reverse()
            emitted = [*tokens[path].tolist(), int(bonus)]
            root, head_candidates = batch.metadata.row_starts[i] + segment.num_new_tokens - 1, None
            if candidates is not None and segment.wants_head_candidates:
                mine = candidates[:, :, i if batch.wanted is None else place].copy()  # the next step overwrites them
                head_candidates = HeadCandidates(ids=mine[1], logits=mine[0].view(np.float32))
                place += 1
            nodes = [accepted - root for accepted in path]
            results.append(SegmentResult(tokens=emitted, accepted_nodes=nodes, head_candidates=head_candidates))
            self.digest = zlib.crc32(np.asarray(emitted, dtype=np.int32).tobytes(), self.digest)
        return results
