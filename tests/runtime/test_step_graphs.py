"""Recorded steps: the same bits as the eager ones, whatever changed since the recording."""

import pytest
import torch
from step_cases import GREEDY, STEPS, agreeable, assert_same, eager_twin, load_runner, plan_of

from euryale.kernels import graph
from euryale.kernels.linear import FrozenLinear
from euryale.parallel.group import single
from euryale.runtime.step_batch import padding
from euryale.runtime.step_graphs import StepGraphs, bucket


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replay_is_the_eager_step(tmp_path, dtype, quantization):
    runner = load_runner(tmp_path, dtype=dtype, quantization=quantization)
    assert runner.graphs is not None
    twin, accepted = eager_twin(runner), 0
    for seed, (shapes, params, context) in enumerate([*STEPS, *STEPS]):
        plan = plan_of(seed, runner.decoder.shard.vocab_size, shapes, params, context)
        accepted += assert_same(runner, twin, agreeable(runner, plan) if params == [GREEDY] else plan)
    assert accepted > 5
    recorded = runner.graphs.recording(plan_of(0, 100, [(1, 3), (1, 0)], [GREEDY], 0)).time()
    product = "linear_run" if quantization == "none" else "quantized_run"
    assert {"take_rows", "tree_attention", product, "top_k", "accept", "commit", "add_silu"} <= set(recorded)


def test_recordings_used_last_are_kept(tmp_path):
    runner = load_runner(tmp_path)
    twin, runner.graphs = eager_twin(runner), StepGraphs(runner.cache, single(), max_rows=10, pads=False, max_graphs=2)
    plans = [plan_of(0, 100, [(1, drafts)], [GREEDY], 20) for drafts in (3, 4, 3, 5, 3, 20)]
    for plan in plans:
        assert_same(runner, twin, plan)
    kept = [runner.graphs.recording(plan) is not None for plan in plans]
    assert kept == [True, False, True, True, True, False]  # 21 rows are more than any may have


def test_buckets_hold_what_they_are_for():
    for requests in range(1, 70):
        for rows in range(requests, 8 * requests):
            for most in (rows, rows + 7, 600):
                padded_rows, padded = bucket(rows, requests, most)
                assert rows <= padded_rows <= most
                assert padded_rows - rows >= padded - requests >= 0
                counts = padding((rows, requests), (padded_rows, padded))
                assert (sum(counts), len(counts)) == (padded_rows - rows, padded - requests)
                assert 0 not in counts
    assert bucket(13000, 200, 16384) == (13000, 200)
    assert bucket(33, 3, 64) == (48, 4)


def test_what_cannot_be_repeated_is_not_recorded():
    weight = torch.randn(4, 4)
    with pytest.raises(RuntimeError, match="linear_size cannot be part of a recorded step"):
        graph.record(lambda: (FrozenLinear(weight)(weight),), weight.device)
    assert torch.allclose(FrozenLinear(weight)(weight), weight @ weight.T, atol=1e-5)  # recording has ended
