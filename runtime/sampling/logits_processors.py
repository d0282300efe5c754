"""Applies biases, penalties and minimum lengths to logits before sampling.

Every row of a tree has a history of its own: the output tokens so far, and the draft tokens on the path from the root
to the row. These are applied in order to each token (l: its logit, c: its count in the answer):

1. ``logit_bias``: l + bias.
2. ``repetition_penalty`` r, if prompt or answer contain the token: l / r if l > 0, else l * r.
3. ``frequency_penalty`` f, ``presence_penalty`` p: l - f c - p (c > 0).
4. ``min_tokens``: -inf for tokens that would end the answer too early.

Temperature, top-k, top-p, min-p and the draw follow. Each rank changes its own shard of the vocabulary. Legend: N
decided rows, V local vocabulary, T rows of one tree, U distinct token ids.
"""

import numpy as np
import torch

from euryale.kernels.step_metadata import tree_tables
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.step_batch import StepBatch
from euryale.scheduler.logits_inputs import LogitsInputs
from euryale.scheduler.step_plan import Segment


def process_logits(shard: VocabShard, logits_NV: torch.Tensor, batch: StepBatch) -> torch.Tensor:
    """Return the processed logits [N, V] of the batch's decided rows, in float32.

    Float32 logits are modified in place. If no request changes logits they are returned unchanged, in their own dtype.
    """
    adjusted = [
        (i, logits_inputs)
        for i in batch.host.emitting
        if (logits_inputs := batch.host.segments[i].logits_inputs) and logits_inputs.changes_logits
    ]
    if not adjusted:
        return logits_NV
    logits_NV = logits_NV.float()
    for i, logits_inputs in adjusted:
        _process_segment(shard, logits_NV[batch.host.decided_rows(i)], batch.host.segments[i], logits_inputs)
    return logits_NV


def _process_segment(shard: VocabShard, logits_TV: torch.Tensor, segment: Segment, logits_inputs: LogitsInputs) -> None:
    """Process the rows of one tree in place, root first."""
    device = logits_TV.device
    depths, ancestors = tree_tables(segment.parents.astype(np.int32).tobytes())
    if len(logits_inputs.bias_ids):
        ids, places = _local_ids(shard, logits_inputs.bias_ids)
        logits_TV[:, torch.from_numpy(ids).to(device)] += torch.from_numpy(logits_inputs.bias[places]).to(device)
    if logits_inputs.has_penalties:
        draft_tokens = segment.tokens[segment.num_new_tokens :]
        all_ids, *tables = _histories(logits_inputs.history, draft_tokens, ancestors)
        ids, places = _local_ids(shard, all_ids)
        counts, is_seen = (torch.from_numpy(x[:, places]).to(device) for x in tables)
        columns = torch.from_numpy(ids).to(device)
        logits_TV[:, columns] = _penalized(logits_TV[:, columns], counts, is_seen, logits_inputs)
    if len(logits_inputs.ends):
        ids, _ = _local_ids(shard, logits_inputs.ends)
        barred = np.ix_(np.flatnonzero(segment.output_index + depths < logits_inputs.min_tokens), ids)
        logits_TV[tuple(torch.from_numpy(x).to(device) for x in barred)] = -torch.inf


def _histories(history: np.ndarray, draft_tokens: np.ndarray, ancestors: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the history of each of T tree nodes.

    Three arrays: distinct token ids [U]; their counts in the node's answer, float32 [T, U]; whether prompt or answer
    contain them, bool [T, U]. ``history``: see ``LogitsInputs``. ``ancestors`` uint64 [T, words]: bit sets of each
    node's ancestors and itself.
    """
    nodes = np.arange(1, len(ancestors))
    words, bits = nodes // 64, (nodes % 64).astype(np.uint64)
    is_above = ancestors[:, words] >> bits & np.uint64(1) != 0  # [T, T - 1]: is the node or its ancestor
    ids = np.union1d(history[0], draft_tokens)
    counts = np.zeros((len(ids), len(ancestors)), dtype=np.float32)
    is_seen = np.zeros(counts.shape, dtype=bool)
    known = np.searchsorted(ids, history[0])
    counts[known], is_seen[known] = history[1][:, None], True
    np.add.at(counts, np.searchsorted(ids, draft_tokens), is_above.T)  # repeated tokens of one path add up
    return ids, counts.T, (is_seen | (counts > 0)).T


def _penalized(
    logits: torch.Tensor, counts: torch.Tensor, is_seen: torch.Tensor, logits_inputs: LogitsInputs
) -> torch.Tensor:
    """Return logits [T, columns] with penalties."""
    if logits_inputs.repetition != 1:
        weaker = torch.where(logits > 0, logits / logits_inputs.repetition, logits * logits_inputs.repetition)
        logits = torch.where(is_seen, weaker, logits)
    return logits - logits_inputs.frequency * counts - logits_inputs.presence * (counts > 0)


def _local_ids(shard: VocabShard, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return this rank's columns of those ``ids`` that its shard holds, int64, and their indices in ``ids``."""
    local = ids.astype(np.int64) - shard.offset
    places = np.flatnonzero((local >= 0) & (local < shard.num_valid))
    return local[places], places
