"""Computes the log-probabilities that requests ask for: of each token and of the likeliest alternatives.

They come from the model's raw logits over the whole vocabulary, before penalties and temperature. Each rank reduces its
shard of a row to a few numbers, and one gather merges them. Ranks never exchange full logits. Legend: M scored rows, V
local vocabulary, k likeliest tokens, R rows of a step, N decided rows, D hidden.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from euryale.parallel import vocabulary
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.model.decoder import Decoder
from euryale.runtime.step_batch import StepBatch
from euryale.scheduler.step_result import SegmentResult, TokenLogprobs

_BLOCK = 64  # prompt rows whose logits are computed at once, to bound memory


@dataclass(frozen=True)
class Scores:
    """Log-probabilities in nats, on the device.

    ``chosen`` float32 [M]; ``top_ids`` int64 [M, k] and their ``top`` float32 [M, k], likeliest first.
    """

    chosen: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor

    def on_host(self, start: int, stop: int, count: int) -> TokenLogprobs:
        """Copy rows ``start`` to ``stop``, with the ``count`` likeliest tokens of each, to the host. Waits for it."""
        chosen, top_ids, top = (x[start:stop].cpu().numpy() for x in (self.chosen, self.top_ids, self.top))
        return TokenLogprobs(chosen, top_ids[:, :count].astype(np.int32), top[:, :count])


def score(shard: VocabShard, logits_MV: torch.Tensor, tokens_M: torch.Tensor, k: int) -> Scores:
    """Compute log-probabilities of ``tokens_M`` int64, one per row, and of each row's ``k`` likeliest tokens.

    A rank sends 8 k + 12 bytes per row in one gather.
    """
    logits_MV = shard.hide_padding(logits_MV)
    top = logits_MV.max(dim=1).values
    shift = torch.where(top == -torch.inf, 0.0, top)  # a rank whose shard is all padding has the maximum -inf
    total = (logits_MV - shift[:, None]).exp().sum(dim=1)
    columns, ids = [top, total, shard.pick(logits_MV, tokens_M)], list[torch.Tensor]()
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
    # In the order of ranks and their candidates, so that a stable sort keeps ties in the order of token ids.
    values = torch.stack(floats[3:], dim=1).flatten(0, 1).T
    values, order = values.sort(dim=1, descending=True, stable=True)
    top_ids = torch.stack(ids, dim=1).flatten(0, 1).T.gather(1, order)
    return Scores(chosen.float(), top_ids[:, :k], (values[:, :k] - log_total[:, None]).float())


@dataclass(frozen=True)
class StepLogprobs:
    """Inputs of a step's log-probabilities.

    ``raw`` float32 [M, V]: unprocessed logits of the decided rows of segments that want log-probabilities, None if
    there are none. ``starts``: the first of these rows of each such segment. ``prompt``: scores of the prompt rows,
    segment after segment, None if there are none.
    """

    shard: VocabShard
    raw: torch.Tensor | None
    starts: dict[int, int]
    prompt: Scores | None

    @classmethod
    def prepare(
        cls, decoder: Decoder, hidden_RD: torch.Tensor, logits_NV: torch.Tensor | None, batch: StepBatch
    ) -> "StepLogprobs | None":
        """Score the prompt rows and copy raw logits; None if no request asks for log-probabilities.

        ``logits_NV``: raw logits of the decided rows, None if there are none. Call before ``process_logits``, which
        modifies them.
        """
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
        assert logits_NV is not None, "rows of segments that emit tokens are decided"
        raw = torch.cat([logits_NV[r] for r in rows]).float()
        return cls(decoder.shard, raw, dict(zip(asking, starts, strict=False)), prompt)

    def add_to(self, batch: StepBatch, results: list[SegmentResult]) -> list[SegmentResult]:
        """Return the step's results with log-probabilities added.

        ``results``: those of the segments that emit tokens. Segments that only score their prompt get a new result.
        """
        output, prompt = self._output_logprobs(batch, results), self._prompt_logprobs(batch)
        of = dict(zip(batch.host.emitting, results, strict=True))
        nothing = SegmentResult(tokens=[], accepted_nodes=[])
        return [
            replace(of.get(i, nothing), logprobs=output.get(i), prompt_logprobs=prompt.get(i))
            for i, segment in enumerate(batch.host.segments)
            if segment.has_result
        ]

    def _output_logprobs(self, batch: StepBatch, results: list[SegmentResult]) -> dict[int, TokenLogprobs]:
        """Log-probabilities of emitted tokens by segment. Their rows are the root and the accepted tree nodes."""
        of = {i: result for i, result in zip(batch.host.emitting, results, strict=True) if i in self.starts}
        if self.raw is None or not of:
            return {}
        row_ids = [self.starts[i] + node for i, result in of.items() for node in (0, *result.accepted_nodes)]
        token_ids = [token for result in of.values() for token in result.tokens]
        rows, tokens = (torch.tensor(x, device=self.raw.device) for x in (row_ids, token_ids))
        wanted = {i: inputs.logprobs for i in of if (inputs := batch.host.segments[i].logits_inputs)}
        scores, found, row = score(self.shard, self.raw[rows], tokens, max(wanted.values())), {}, 0
        for i, result in of.items():
            found[i] = scores.on_host(row, row + len(result.tokens), wanted[i])
            row += len(result.tokens)
        return found

    def _prompt_logprobs(self, batch: StepBatch) -> dict[int, TokenLogprobs]:
        """Log-probabilities of scored prompt tokens by segment."""
        if self.prompt is None:
            return {}
        found, row = {}, 0
        for i, segment in enumerate(batch.host.segments):
            if segment.logits_inputs is not None and (count := len(segment.logits_inputs.targets)):
                found[i] = self.prompt.on_host(row, row + count, segment.logits_inputs.prompt_logprobs)
                row += count
        return found


def _score_prompts(decoder: Decoder, hidden_RD: torch.Tensor, batch: StepBatch) -> Scores | None:
    """Score the prompt tokens that segments ask for; None if there are none."""
    row_ids: list[int] = []
    token_ids: list[int] = []
    k = 0
    for start, segment in zip(batch.metadata.row_starts, batch.host.segments, strict=False):
        if segment.logits_inputs is not None and len(segment.logits_inputs.targets):
            first = start + segment.logits_inputs.first_target
            row_ids += range(first, first + len(segment.logits_inputs.targets))
            token_ids += segment.logits_inputs.targets.tolist()
            k = max(k, segment.logits_inputs.prompt_logprobs)
    if not row_ids:
        return None
    rows, targets = (torch.tensor(x, device=hidden_RD.device) for x in (row_ids, token_ids))
    blocks = zip(rows.split(_BLOCK), targets.split(_BLOCK), strict=True)
    scores = [score(decoder.shard, decoder.logits(hidden_RD[r]), t, k) for r, t in blocks]
    return Scores(*(torch.cat([getattr(s, name) for s in scores]) for name in ("chosen", "top_ids", "top")))
