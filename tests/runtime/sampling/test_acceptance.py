"""Acceptance rules end to end: seeded sampling with and without speculation, typical against its formula."""

import dataclasses

import numpy as np
import pytest
import torch
from support import answer, family_config, head_tensors, make_model, prompts, save_heads
from textbook import typical_by_hand

from euryale.parallel.group import single
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.config import EngineConfig
from euryale.runtime.sampling.acceptance import decide
from euryale.runtime.step_batch import StepBatch
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_plan import Segment, StepPlan

LENGTH = 24
MIXED = [
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(),
    SamplingParams(temperature=1.0, top_k=20, seed=2),
    SamplingParams(temperature=0.6, top_p=0.9, seed=3),
    SamplingParams(temperature=1.2, min_p=0.05, seed=2**64 - 1),
    SamplingParams(temperature=0.3, top_k=50, top_p=0.95, seed=5),
    SamplingParams(temperature=2.0, top_p=0.99, seed=6),
    SamplingParams(temperature=0.5, seed=7),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    made = make_model(directory, family_config("llama", tie_word_embeddings=True), seed=3)
    # Confident heads: several residual layers and the backbone's lm_head (format B).
    heads = save_heads(directory / "heads", head_tensors(made, num_layers=2, own_lm_head=False))
    return directory, heads


def run(ranks, size, model, params, **changes):
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "dtype": "float32"} | changes
    arrivals = settings.pop("arrivals", 0)
    config = EngineConfig(model=str(model[0]), medusa=str(model[1]), **settings)
    params = [dataclasses.replace(p, max_tokens=LENGTH, ignore_eos=True) for p in params]
    wanted = list(zip(prompts(len(params)), params, strict=True))
    return ranks(size).run(answer, config, wanted, arrivals)[0]


def test_seeded_sampling_does_not_depend_on_speculation_batch_or_group(model, ranks):
    plain = run(ranks, 1, model, MIXED, tree="off", max_num_seqs=1)
    assert len({tuple(o) for o in plain["outputs"]}) == len(MIXED)
    # Budgeted trees run on one rank only, because every group would profile its steps for seconds.
    for size, changes in [
        (1, {}),
        (1, {"tree": "chain"}),
        (1, {"tree": "dynamic:12"}),
        (2, {"tree": "dynamic:12"}),
        (2, {"tree": "static"}),
        (4, {"tree": "dynamic:12"}),
        (1, {"arrivals": 3}),
        (2, {"tree": "off"}),
    ]:
        assert run(ranks, size, model, MIXED, **changes)["outputs"] == plain["outputs"], (size, changes)
    tree = run(ranks, 1, model, MIXED, tree="static")
    assert tree["steps"] < plain["steps"]
    assert any(n > 1 for accepted in tree["tokens_per_step"] for n in accepted)


def test_typical_in_the_same_batch_leaves_exact_requests_alone(model, ranks):
    mixed = [dataclasses.replace(p, acceptance="typical" if i % 2 else "exact") for i, p in enumerate(MIXED)]
    # Typical acceptance depends on the tree, so the tree must be the same in every run.
    exact, typical = run(ranks, 1, model, MIXED, tree="static"), run(ranks, 1, model, mixed, tree="static")
    assert typical["outputs"][::2] == exact["outputs"][::2]
    assert typical["outputs"][1] == exact["outputs"][1]  # greedy: typical accepts the argmax only
    for size in (2, 4):
        assert run(ranks, size, model, mixed, tree="static")["outputs"] == typical["outputs"]


def test_typical_is_the_formula():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    vocab, lengths = 60, []
    for trial in range(60):
        num_nodes = int(rng.integers(2, 30))
        parents = np.asarray([rng.integers(0, node) for node in range(1, num_nodes)], dtype=np.int32)
        tokens = rng.integers(0, vocab, size=num_nodes).astype(np.int32)
        params = SamplingParams(
            temperature=float(rng.uniform(0.3, 2)), seed=trial, acceptance="typical", epsilon=0.2, delta=0.6
        )
        logits = torch.randn(num_nodes, vocab)
        logits[parents, tokens[1:]] += 3.0 * (trial % 3 > 0)  # in most trials likely enough for long paths
        segment = Segment(
            tokens=tokens,
            parents=parents,
            pages=np.zeros(8, dtype=np.int32),
            context=5,
            emits_tokens=True,
            wants_head_candidates=False,
            output_index=trial,
            params=params,
        )
        batch = StepBatch.of(StepPlan(segments=[segment]), 16, torch.device("cpu"))
        got = decide(VocabShard(single(), vocab, vocab), logits.clone(), batch)
        slots = batch.metadata.slots.tolist()
        path, bonus = typical_by_hand(logits, tokens, parents.tolist(), params, trial)
        assert got.commit_slots.tolist() == [slot if n == 0 or n in path else -1 for n, slot in enumerate(slots)]
        assert int(got.next_tokens[got.last_rows[0]]) == bonus
        lengths.append(len(path))
    assert max(lengths) >= 3
    assert min(lengths) == 0
