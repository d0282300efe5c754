"""Recorded steps: the same bits as the eager ones, whatever changed since the recording."""

import numpy as np
import pytest
import torch
from support import family_config, make_model

from euryale.kernels.geometry import SegmentShape, StepGeometry
from euryale.kernels.graph import Graphs
from euryale.parallel.group import single
from euryale.runtime.config import EngineConfig
from euryale.runtime.loading import load

PAGE = 16


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, family_config("qwen3"))
    config = EngineConfig(model=str(directory), max_num_seqs=4, max_num_batched_tokens=64, kv_cache_memory=0.01)
    runner = load(config, single()).runner
    torch.manual_seed(0)
    runner.cache.pages.normal_()
    return runner


def geometry(seed: int, drafts: int, context: int) -> StepGeometry:
    """A request of 1 + ``drafts`` rows and a lone token of another, on random pages."""
    rng = np.random.default_rng(seed)
    pages = rng.permutation(40).astype(np.int32)
    parents = np.asarray([rng.integers(0, i + 1) for i in range(drafts)], dtype=np.int32)
    none = np.zeros(0, dtype=np.int32)
    shapes = [
        SegmentShape(num_certain=1, context=context, parents=parents, pages=pages[:20]),
        SegmentShape(num_certain=1, context=3 * seed, parents=none, pages=pages[20:]),
    ]
    return StepGeometry.build(shapes, PAGE, torch.device("cpu"))


@torch.inference_mode()
def test_a_replay_is_the_eager_step(runner):
    decoder, cache = runner.decoder, runner.cache
    transform = lambda x, geometry: decoder.transform(x, cache, geometry)  # noqa: E731
    graphs = Graphs(transform, max_rows=10, max_graphs=2)
    for seed, (drafts, context) in enumerate([(3, 0), (3, 40), (5, 16), (3, 200), (0, 7), (5, 1), (20, 5)]):
        place = geometry(seed, drafts, context)
        x = decoder.embed_tokens(torch.arange(place.num_rows) + 7 * seed)
        expected, scratch = transform(x.clone(), place), cache.scratch.clone()
        cache.scratch.zero_()
        got, status = graphs(x, geometry(seed, drafts, context))
        assert status == 0
        assert torch.equal(got, expected)
        rows = place.num_rows
        assert torch.equal(cache.scratch[:, :, :rows], scratch[:, :, :rows])
    assert len(graphs._graphs) == 2  # those used last; 21 rows are more than any may have
    assert set(graphs.graph(7).time()) == {"tree_attention", "rope_qk", "add_rms_norm", "silu_mul", "linear_run"}
