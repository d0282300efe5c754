"""Penalties, biases and barred tokens: what changes logits before anything is drawn from them.

Every row of a tree is changed by its own history: the output tokens so far and the drafts from the tree's root down to
the row, which would be output tokens by then. In this order, per token (l: its logit, c: how often the answer has it):

1. ``logit_bias``: l + bias.
2. ``repetition_penalty`` r, where prompt or answer have the token: l / r if l > 0, else l * r.
3. ``frequency_penalty`` f, ``presence_penalty`` p: l - f c - p (c > 0).
4. ``min_tokens``: -inf for tokens that would end the answer too early.

Temperature, top-k, top-p, min-p and the draw come after. Each rank changes its own part of the vocabulary.
"""

import numpy as np
import torch

from euryale.kernels.step_metadata import tree_tables
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.step_batch import StepBatch
from euryale.scheduler.logits_inputs import LogitsInputs
from euryale.scheduler.step_plan import Segment


def process_logits(shard: VocabShard, logits_NV: torch.Tensor, batch: StepBatch) -> torch.Tensor:
    """The logits [N, V] of the batch's decided rows as its requests want them changed: float32, in place if they are
    float32 already; as they are if no request wants that."""
    adjusted = [
        i
        for i in batch.host.emitting
        if (logits_inputs := batch.host.segments[i].logits_inputs) and logits_inputs.changes_logits
    ]
    if not adjusted:
        return logits_NV
    logits_NV = logits_NV.float()
    for i in adjusted:
        _process_segment(shard, logits_NV[batch.host.decided_rows(i)], batch.host.segments[i])
    return logits_NV


def _process_segment(shard: VocabShard, logits_TV: torch.Tensor, segment: Segment) -> None:
    """Change the rows of one tree, root first, in place."""
    logits_inputs, device = segment.logits_inputs, logits_TV.device
    depths, ancestors = tree_tables(segment.parents.astype(np.int32).tobytes())
    if len(logits_inputs.bias_ids):
        ids, places = _mine(shard, logits_inputs.bias_ids)
        logits_TV[:, torch.from_numpy(ids).to(device)] += torch.from_numpy(logits_inputs.bias[places]).to(device)
    if logits_inputs.has_penalties:
        drafts = segment.tokens[segment.num_new_tokens :]
        ids, counts, is_seen = _histories(logits_inputs.history, drafts, ancestors)
        ids, places = _mine(shard, ids)
        counts, is_seen = (torch.from_numpy(x[:, places]).to(device) for x in (counts, is_seen))
        columns = torch.from_numpy(ids).to(device)
        logits_TV[:, columns] = _penalized(logits_TV[:, columns], counts, is_seen, logits_inputs)
    if len(logits_inputs.ends):
        ids, _ = _mine(shard, logits_inputs.ends)
        barred = np.ix_(np.flatnonzero(segment.output_index + depths < logits_inputs.min_tokens), ids)
        logits_TV[tuple(torch.from_numpy(x).to(device) for x in barred)] = -torch.inf


def _histories(history: np.ndarray, drafts: np.ndarray, ancestors: np.ndarray) -> tuple[np.ndarray, ...]:
    """What each of T nodes has behind it: distinct token ids [U], how often its answer has each, float32 [T, U], and
    whether its prompt or answer has it, bool [T, U]. ``ancestors`` uint64 [T, W], a node's own bit set."""
    nodes = np.arange(1, len(ancestors))
    words, bits = nodes // 64, (nodes % 64).astype(np.uint64)
    is_above = ancestors[:, words] >> bits & np.uint64(1) != 0  # [T, drafts]: the draft is the node or an ancestor
    ids = np.union1d(history[0], drafts)
    counts = np.zeros((len(ids), len(ancestors)), dtype=np.float32)
    is_seen = np.zeros(counts.shape, dtype=bool)
    known = np.searchsorted(ids, history[0])
    counts[known], is_seen[known] = history[1][:, None], True
    np.add.at(counts, np.searchsorted(ids, drafts), is_above.T)  # equal drafts of one path add up
    return ids, counts.T, (is_seen | (counts > 0)).T


def _penalized(
    logits: torch.Tensor, counts: torch.Tensor, is_seen: torch.Tensor, logits_inputs: LogitsInputs
) -> torch.Tensor:
    if logits_inputs.repetition != 1:
        weaker = torch.where(logits > 0, logits / logits_inputs.repetition, logits * logits_inputs.repetition)
        logits = torch.where(is_seen, weaker, logits)
    return logits - logits_inputs.frequency * counts - logits_inputs.presence * (counts > 0)


def _mine(shard: VocabShard, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """This rank's columns of the token ids that it has, int64, and the places of these among ``ids``."""
    local = ids.astype(np.int64) - shard.offset
    places = np.flatnonzero((local >= 0) & (local < shard.num_valid))
    return local[places], places
