"""Drawing tokens over a sharded vocabulary: distribution, filters, independence of the group size."""

import numpy as np
import pytest
import torch
from support import row_params
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from euryale.kernels.sample.noise import gumbel, stream_key
from euryale.kernels.top_k import values_and_ids
from euryale.parallel import vocabulary
from euryale.parallel.group import single
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.sampling.sampler import draw
from euryale.scheduler.sampling_params import SamplingParams


def shard_of(group, vocab: int) -> VocabShard:
    return VocabShard(group, vocab, -(-vocab // group.size))


def draw_on(group, logits: torch.Tensor, rows: list, pairs=None):
    """Every rank cuts its shard of full logits [N, V] and draws; returns plain lists."""
    shard = shard_of(group, logits.shape[1])
    padded = torch.nn.functional.pad(logits, (0, shard.length * group.size - logits.shape[1]))
    local = shard.hide_padding(padded[:, shard.offset : shard.offset + shard.length].clone())
    drawn = draw(shard, local, row_params(rows), pairs)
    extra = None if pairs is None else (drawn.child_logp.tolist(), drawn.entropy.tolist())
    return drawn.tokens.tolist(), extra


def filtered_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """transformers' own processors, in its order."""
    scores = logits[None].double()
    warpers = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    for warper in warpers:
        scores = warper(None, scores)
    return scores[0].softmax(-1)


FILTERS = [
    {},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.08},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.01},
    {"top_k": 100},  # more than the candidates that ranks send
    {"top_p": 0.9999},  # a nucleus wider than the candidates
    {"top_k": 150, "top_p": 0.999},
    {"top_k": 10_000, "top_p": 0.95},
    {"min_p": 1e-30},  # keeps everything
]


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_follow_the_filtered_softmax(filters, temperature):
    """Chi-squared over 20,000 draws of one row. The bound is the 1 - 1e-5 quantile (normal approximation), so that
    of these 20 fixed-seed cases a right sampler fails in 0.02 % of seeds."""
    torch.manual_seed(1)
    logits = torch.randn(211) * 2
    params = SamplingParams(temperature=temperature, seed=7, **filters)
    count = 20_000
    tokens, _ = draw_on(single(), logits[None].expand(count, -1).contiguous(), [(params, i) for i in range(count)])
    expected = filtered_probabilities(logits, params) * count
    seen = torch.bincount(torch.tensor(tokens), minlength=211).double()
    assert seen[expected == 0].sum() == 0, "a token was drawn that the filters exclude"
    kept = expected >= 5
    chi = ((seen[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    rest = expected[~kept].sum()
    if rest > 5:
        chi += (seen[~kept].sum() - rest) ** 2 / rest
    degrees = kept.sum() - 1 + (rest > 5)
    assert chi < degrees + 4.3 * (2 * degrees).sqrt() + 12


@pytest.mark.parametrize("size", [2, 4])
def test_every_group_size_draws_the_same_tokens(ranks, size):
    torch.manual_seed(2)
    logits = torch.randn(40, 301) * 3
    rows = []
    for i in range(40):
        filters = FILTERS[i % len(FILTERS)]
        rows.append((SamplingParams(temperature=(i % 3) * 0.6, seed=i, **filters), i))
    pairs = torch.tensor([[i, (i * 7) % 301] for i in range(40)])
    expected, (logp, entropy) = draw_on(single(), logits, rows, pairs)
    for got, (other_logp, other_entropy) in ranks(size).run(draw_on, logits, rows, pairs):
        assert got == expected
        # Sums of exponentials are taken in another order; float32 keeps 6 digits.
        np.testing.assert_allclose(other_logp, logp, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(other_entropy, entropy, rtol=1e-5, atol=1e-5)


def top_k_on(group, logits: torch.Tensor, k: int):
    shard = shard_of(group, logits.shape[1])
    padded = torch.nn.functional.pad(logits, (0, shard.length * group.size - logits.shape[1]))
    local = shard.hide_padding(padded[:, shard.offset : shard.offset + shard.length].clone())
    values, ids = values_and_ids(vocabulary.top_k(shard, local, k))
    return values.tolist(), ids.tolist(), vocabulary.argmax(shard, local).tolist()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("vocab", [5, 301])
def test_top_k_is_that_of_the_whole_vocabulary(ranks, size, vocab):
    torch.manual_seed(3)
    logits = torch.randn(9, vocab)
    expected = logits.topk(5)
    for values, ids, largest in ranks(size).run(top_k_on, logits, 5):
        assert ids == expected.indices.tolist()
        assert values == expected.values.tolist()
        assert largest == expected.indices[:, 0].tolist()


def test_ties_go_to_the_smallest_token(ranks):
    logits = torch.zeros(2, 300)
    logits[:, [40, 170, 260]] = 1.0
    for _, ids, largest in ranks(4).run(top_k_on, logits, 3):
        assert ids == [[40, 170, 260]] * 2
        assert largest == [40, 40]


def test_entropy_and_log_probability():
    torch.manual_seed(4)
    logits, pairs = torch.randn(3, 97), torch.tensor([[0, 5], [1, 90], [2, 0]])
    rows = [(SamplingParams(temperature=0.8), i) for i in range(3)]
    _, (logp, entropy) = draw_on(single(), logits, rows, pairs)
    expected = torch.distributions.Categorical(logits=logits / 0.8)
    np.testing.assert_allclose(logp, expected.log_prob(pairs[:, 1]), rtol=1e-5)  # float32 sums
    np.testing.assert_allclose(entropy, expected.entropy(), rtol=1e-5)


def test_a_nucleus_of_one_token_is_drawn_even_where_the_noise_is_lowest():
    """At this key the generator's 32 bits for this token are all but ones; rounded to 1 they would give -inf."""
    token, params = 922915, {"temperature": 1.0, "seed": 1}
    logits = torch.zeros(1, token + 1)
    logits[0, token] = 40.0
    for filters in ({"top_k": 1}, {"top_p": 0.9}):
        tokens, _ = draw_on(single(), logits, [(SamplingParams(**params, **filters), 65)])
        assert tokens == [token]


def test_noise_is_gumbel_and_depends_on_every_part_of_its_key():
    ids = torch.arange(200_000)
    noise = gumbel(torch.tensor(stream_key(3, 0, 0)), ids)
    # Mean 0.5772 and variance pi^2 / 6; with 200,000 draws the standard errors are 0.003 and 0.008.
    assert abs(noise.mean() - 0.5772) < 0.015
    assert abs(noise.var() - 1.6449) < 0.04
    keys = {stream_key(*parts) for parts in [(3, 0, 0), (4, 0, 0), (3, 1, 0), (3, 0, 1), (2**63 + 3, 0, 0)]}
    assert len(keys) == 5
    other = gumbel(torch.tensor(stream_key(3, 0, 1)), ids)
    assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < 0.01  # standard error 0.002
