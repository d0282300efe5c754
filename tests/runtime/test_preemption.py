"""Few pages: requests are preempted and recomputed, and no token changes."""

import dataclasses

import pytest
from support import HEAD_DIM, KV_HEADS, answer, family_config, head_tensors, make_model, prompts, save_heads

from euryale.runtime.config import EngineConfig
from euryale.runtime.kv_cache import GIB
from euryale.scheduler.sampling_params import SamplingParams

LENGTH, PAGE = 40, 8
NUM_PAGES = 24  # the longest of the prompts and its answer need 18


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    return directory, save_heads(directory / "heads", head_tensors(make_model(directory, family_config("llama"))))


def wanted():
    """Greedy and seeded requests of three priorities, some of which begin alike."""
    asked = prompts(8, seed=5)
    asked[5] = asked[4].copy()
    drawn = {"temperature": 0.9, "top_p": 0.95}
    return [
        (
            prompt,
            SamplingParams(max_tokens=LENGTH, ignore_eos=True, seed=i, priority=-i % 3, **(drawn if i % 2 else {})),
        )
        for i, prompt in enumerate(asked)
    ]


def run(ranks, size, model, asked, arrivals=0, **changes):
    settings = {"max_num_seqs": 6, "max_num_batched_tokens": 40, "dtype": "float32", "page_size": PAGE} | changes
    config = EngineConfig(model=str(model[0]), medusa=str(model[1]), **settings)
    return ranks(size).run(answer, config, asked, arrivals)[0]


def memory(size: int) -> float:
    """GiB that one of ``size`` ranks needs for NUM_PAGES pages of two layers in float32, plus half a page."""
    return (NUM_PAGES + 0.5) * 2 * 2 * (KV_HEADS // size) * PAGE * HEAD_DIM * 4 / GIB


@pytest.fixture(scope="module")
def undisturbed(ranks, model):
    got = run(ranks, 1, model, wanted())
    assert got["preempted"] == [0] * 8
    return got


@pytest.mark.parametrize("changes", [{}, {"tree": "off", "starvation_bound": 6}, {"enable_prefix_caching": False}])
@pytest.mark.parametrize("size", [1, 2])
def test_preemption_changes_no_token(ranks, model, undisturbed, size, changes):
    arrivals = 2 if changes else 0
    few = run(ranks, size, model, wanted(), arrivals, kv_cache_memory=memory(size), **changes)
    assert sum(few["preempted"]) > 0
    assert few["recomputed"] > 0
    assert few["outputs"] == undisturbed["outputs"]
    assert few["reasons"] == undisturbed["reasons"]


@pytest.mark.parametrize("size", [1, 2])
def test_pages_run_short_among_equals(ranks, model, undisturbed, size):
    equal = [(prompt, dataclasses.replace(params, priority=0)) for prompt, params in wanted()]
    few = run(ranks, size, model, equal, kv_cache_memory=memory(size))
    assert sum(few["preempted"]) > 0
    assert few["outputs"] == undisturbed["outputs"]


def test_a_better_priority_takes_the_only_place(ranks, model, undisturbed):
    asked = [
        (prompt, dataclasses.replace(params, priority=p))
        for (prompt, params), p in zip(wanted()[:3], (1, 2, 0), strict=True)
    ]
    got = run(ranks, 1, model, asked, arrivals=4, max_num_seqs=1)  # the third comes at the fourth step
    assert got["preempted"] == [1, 0, 0]
    assert got["outputs"] == undisturbed["outputs"][:3]
