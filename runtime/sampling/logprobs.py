"""Log-probabilities that requests ask to be told: of each token, and of the likeliest in its place.

They are those of the model's own raw logits, before penalties and temperature, over the whole vocabulary. Each rank
reduces its part of a row to a few numbers, and one gather merges them; full logits never cross the wire.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from euryale.parallel import vocabulary
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.model.decoder import Decoder
from euryale.runtime.step_batch import StepBatch
from euryale.scheduler.step_result import SegmentResult, TokenLogprobs

_BLOCK = 64  # prompt rows whose logits are in memory at the same time


@dataclass(frozen=True)
class Scores:
    """``chosen`` float32 [M], ``top_ids`` int64 [M, k], ``top`` float32 [M, k]: natural logarithms, likeliest first."""

    chosen: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor

    def on_host(self, start: int, stop: int, count: int) -> TokenLogprobs:
        """Return rows ``start`` to ``stop`` with the ``count`` likeliest of each; waits for the device."""
        chosen, top_ids, top = (x[start:stop].cpu().numpy() for x in (self.chosen, self.top_ids, self.top))
        return TokenLogprobs(chosen, top_ids[:, :count].astype(np.int32), top[:, :count])


def score(shard: VocabShard, logits_MV: torch.Tensor, tokens_M: torch.Tensor, k: int) -> Scores:
    """Log-probabilities of ``tokens_M`` int64 and of the ``k`` likeliest under each row, in one gather of 8 k + 12
    bytes per row and rank."""
    logits_MV = shard.hide_padding(logits_MV)
    top = logits_MV.max(dim=1).values
    shift = torch.where(top == -torch.inf, 0.0, top)  # a rank whose shard is all padding says -inf, 0
    total = (logits_MV - shift[:, None]).exp().sum(dim=1)
    columns, ids = [top, total, shard.pick(logits_MV, tokens_M)], []
    if k:
        values, found = vocabulary.local_top_k(shard, logits_MV, k)
        columns += values.unbind(1)
        ids += found.unbind(1)
    floats, ids = vocabulary.unpack(shard.group.all_gather(vocabulary.pack(columns, ids)), len(columns))
    tops, totals = floats[0].double(), floats[1].double()
    highest = tops.max(dim=0).values
    log_total = highest + (totals * (tops - highest).exp()).sum(dim=0).log()
    chosen = floats[2].max(dim=0).values - log_total
    if not k:
        nothing = torch.empty(len(chosen), 0, device=chosen.device)
        return Scores(chosen.float(), nothing.long(), nothing)
    # Ranks and candidates in order, so that a stable sort leaves equals in the order of their ids.
    values = torch.stack(floats[3:], dim=1).flatten(0, 1).T
    values, order = values.sort(dim=1, descending=True, stable=True)
    top_ids = torch.stack(ids, dim=1).flatten(0, 1).T.gather(1, order)
    return Scores(chosen.float(), top_ids[:, :k], (values[:, :k] - log_total[:, None]).float())


@dataclass(frozen=True)
class StepLogprobs:
    """What a step will tell besides its tokens. ``raw`` float32 [M, V]: logits of the decided rows of segments that
    want log-probabilities, as they were before any change; ``starts``: where each of these segments begins there;
    ``prompt``: scores of the prompt rows, segment after segment. Either is None if nobody asks for it."""

    shard: VocabShard
    raw: torch.Tensor | None
    starts: dict[int, int]
    prompt: Scores | None

    @classmethod
    def prepare(
        cls, decoder: Decoder, hidden_RD: torch.Tensor, logits_NV: torch.Tensor | None, batch: StepBatch
    ) -> "StepLogprobs | None":
        """Of hidden states [R, D] and raw logits [N, V] of the decided rows (None: there are none); None if no request
        asks for log-probabilities. To be called before the logits are changed."""
        asking = [
            i
            for i in batch.host.emitting
            if (logits_inputs := batch.host.segments[i].logits_inputs) and logits_inputs.logprobs >= 0
        ]
        prompt = _score_prompts(decoder, hidden_RD, batch)
        if not asking:
            return cls(decoder.shard, None, {}, prompt) if prompt else None
        rows = [batch.host.decided_rows(i) for i in asking]
        starts = np.cumsum([0] + [r.stop - r.start for r in rows]).tolist()
        raw = torch.cat([logits_NV[r] for r in rows]).float()
        return cls(decoder.shard, raw, dict(zip(asking, starts, strict=False)), prompt)

    def add_to(self, batch: StepBatch, results: list[SegmentResult]) -> list[SegmentResult]:
        """The step's results, of the sampling segments, with the step_logprobs in their places, and with results that
        hold nothing else for segments that only report on their prompt."""
        drawn, told = self._output_logprobs(batch, results), self._prompt_logprobs(batch)
        of = dict(zip(batch.host.emitting, results, strict=True))
        nothing = SegmentResult(tokens=[], accepted_nodes=[])
        return [
            replace(of.get(i, nothing), logprobs=drawn.get(i), prompt_logprobs=told.get(i))
            for i, segment in enumerate(batch.host.segments)
            if segment.has_result
        ]

    def _output_logprobs(self, batch: StepBatch, results: list[SegmentResult]) -> dict[int, TokenLogprobs]:
        """By segment, of every token that the walk emitted: its rows are the root and the accepted nodes."""
        of = {i: result for i, result in zip(batch.host.emitting, results, strict=True) if i in self.starts}
        if not of:
            return {}
        rows = [self.starts[i] + node for i, result in of.items() for node in (0, *result.accepted_nodes)]
        tokens = [token for result in of.values() for token in result.tokens]
        rows, tokens = (torch.tensor(x, device=self.raw.device) for x in (rows, tokens))
        wanted = {i: batch.host.segments[i].logits_inputs.logprobs for i in of}
        scores, found, row = score(self.shard, self.raw[rows], tokens, max(wanted.values())), {}, 0
        for i, result in of.items():
            found[i] = scores.on_host(row, row + len(result.tokens), wanted[i])
            row += len(result.tokens)
        return found

    def _prompt_logprobs(self, batch: StepBatch) -> dict[int, TokenLogprobs]:
        found, row = {}, 0
        for i, segment in enumerate(batch.host.segments):
            if segment.logits_inputs is not None and (count := len(segment.logits_inputs.targets)):
                found[i] = self.prompt.on_host(row, row + count, segment.logits_inputs.prompt_logprobs)
                row += count
        return found


def _score_prompts(decoder: Decoder, hidden_RD: torch.Tensor, batch: StepBatch) -> Scores | None:
    rows, targets, k = [], [], 0
    for start, segment in zip(batch.metadata.row_starts, batch.host.segments, strict=False):
        if segment.logits_inputs is not None and len(segment.logits_inputs.targets):
            first = start + segment.logits_inputs.first_target
            rows += range(first, first + len(segment.logits_inputs.targets))
            targets += segment.logits_inputs.targets.tolist()
            k = max(k, segment.logits_inputs.prompt_logprobs)
    if not rows:
        return None
    rows, targets = (torch.tensor(x, device=hidden_RD.device) for x in (rows, targets))
    blocks = zip(rows.split(_BLOCK), targets.split(_BLOCK), strict=True)
    scores = [score(decoder.shard, decoder.logits(hidden_RD[r]), t, k) for r, t in blocks]
    return Scores(*(torch.cat([getattr(s, name) for s in scores]) for name in ("chosen", "top_ids", "top")))
