"""What crosses the wire for a row does not depend on the vocabulary."""

import pytest
import torch
from support import row_params

from euryale.parallel import vocabulary
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.sampling.sampler import draw
from euryale.scheduler.sampling_params import SamplingParams

ROWS = 5


def bytes_sent(group, vocab_size: int) -> dict[str, float]:
    """Bytes that a rank sends per row, by what the row asks for."""
    length = -(-vocab_size // group.size)
    shard = VocabShard(group, vocab_size, length)
    logits = shard.hide_padding(torch.randn(ROWS, length, generator=torch.Generator().manual_seed(group.rank)))
    sent, inner = [], group.collectives.all_gather

    def all_gather(x):
        sent.append(x.nbytes)
        return inner(x)

    group.collectives.all_gather = all_gather
    kinds = {
        "sampled": SamplingParams(temperature=1.0, seed=3),
        "top-k": SamplingParams(temperature=1.0, top_k=20),
    }
    found = {}
    try:
        vocabulary.argmax(shard, logits)
        found["greedy"] = sum(sent) / ROWS
        sent.clear()
        vocabulary.top_k(shard, logits, 10)
        found["candidates"] = sum(sent) / ROWS
        for name, params in kinds.items():
            sent.clear()
            draw(shard, logits, row_params([(params, row) for row in range(ROWS)]), None)
            found[name] = sum(sent) / ROWS
    finally:
        del group.collectives.all_gather
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_per_row(ranks, size):
    small, large = (ranks(size).run(bytes_sent, vocab_size) for vocab_size in (1001, 100003))
    assert small == large
    # A value and an id; ten of them; three moments beside the best and 64 candidates.
    assert small[0] == {"greedy": 8, "candidates": 80, "sampled": 8, "top-k": 20 + 64 * 8}
