"""Greedy float32 answers are transformers' at every group size, tree and batch."""

import numpy as np
import pytest
from support import answer, family_config, head_tensors, make_model, oracle_greedy, prompts, save_heads

from euryale.runtime.config import EngineConfig
from euryale.scheduler.sampling_params import SamplingParams

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LENGTH = 20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Every family's directory, heads directory, prompts and transformers' answers."""
    made = {}
    for family in FAMILIES:
        directory = tmp_path_factory.mktemp(family)
        model = make_model(directory, family_config(family), shard_size="600KB" if family == "qwen2" else "5GB")
        heads = save_heads(directory / "heads", head_tensors(model))
        asked = prompts(8)
        made[family] = (directory, heads, asked, [oracle_greedy(model, p, LENGTH) for p in asked])
    return made


def run(ranks, size, directory, heads, asked, **changes):
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 40, "dtype": "float32", "tree": "static"} | changes
    config = EngineConfig(model=str(directory), medusa=str(heads), **settings)
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True)
    arrivals = 2 if config.loop == "overlapped" else 0  # requests arrive while a step runs
    return ranks(size).run(answer, config, [(p, params) for p in asked], arrivals)[0]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(models, ranks, family, size):
    directory, heads, asked, expected = models[family]
    tree = run(ranks, size, directory, heads, asked)
    assert tree["outputs"] == expected
    assert sum(map(sum, tree["tokens_per_step"])) == LENGTH * len(asked)


CHANGES = [
    {"tree": "off"},
    {"tree": "chain"},
    {"tree": "dynamic"},
    {"tree": "dynamic:6", "max_num_seqs": 3},
    {"max_num_seqs": 1},
    {"max_num_seqs": 3},
    {"eager": True},
    {"loop": "overlapped"},
]


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize(("family", "size"), [*((family, 1) for family in FAMILIES), ("mistral", 2), ("mistral", 4)])
def test_no_setting_changes_greedy_tokens(models, ranks, changes, family, size):
    directory, heads, asked, expected = models[family]
    got = run(ranks, size, directory, heads, asked, **changes)
    assert got["outputs"] == expected
    if changes.get("tree") == "off":
        assert all(n == 1 for accepted in got["tokens_per_step"] for n in accepted)


@pytest.mark.parametrize("size", [1, 2])
def test_shared_pages_change_no_token(tmp_path, ranks, size):
    model = make_model(tmp_path, family_config("mistral"))
    heads = save_heads(tmp_path / "heads", head_tensors(model))
    long = prompts(8, seed=3)
    asked = [np.concatenate([*long, p]) for p in long] + [np.concatenate([*long, long[0], long[1]])]
    expected = [oracle_greedy(model, p, LENGTH) for p in asked]
    for changes in ({}, {"enable_prefix_caching": False}):
        got = run(ranks, size, tmp_path, heads, asked, **changes)
        assert got["outputs"] == expected
        assert (got["shared"] > 4 * len(np.concatenate(long))) == (not changes)


def test_some_drafts_are_accepted(models, ranks):
    """If none were accepted, equal outputs would not test trees."""
    directory, heads, asked, _ = models["llama"]
    got = run(ranks, 1, directory, heads, asked)
    assert sum(len(a) for a in got["tokens_per_step"]) < LENGTH * len(asked)
