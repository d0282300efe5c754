"""Steps of many shapes, for comparing runners: recorded and eager, padded and not."""

import copy

import numpy as np
import torch
from support import VOCAB, family_config, head_tensors, make_model, save_heads

from euryale.parallel.group import Group
from euryale.runtime.config import EngineConfig
from euryale.runtime.startup import load
from euryale.runtime.step import StepRunner
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_plan import Segment, StepPlan

PAGE = 16


def load_runner(
    directory, device: str = "cpu", dtype: str = "float32", quantization: str = "none", vocab: int = VOCAB
) -> StepRunner:
    made = make_model(directory, family_config("qwen3", vocab_size=vocab))
    heads = save_heads(directory / "heads", head_tensors(made, num_layers=2))
    config = EngineConfig(
        model=str(directory),
        medusa=str(heads),
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kv_cache_memory=0.01,
        dtype=dtype,
        quantization=quantization,
        device=device,
    )
    runner = load(config, Group(0, 1, torch.device(device))).runner
    torch.manual_seed(0)
    runner.cache.pages.normal_()
    return runner


def eager_twin(runner: StepRunner) -> StepRunner:
    """Return the same model without recordings, on a copy of its cache."""
    cache = copy.copy(runner.cache)
    cache.pages, cache.scratch = runner.cache.pages.clone(), runner.cache.scratch.clone()
    cache._layers = list(zip(cache.scratch.unbind(), cache.pages.unbind(), strict=True))
    return StepRunner(runner.decoder, runner.heads, cache, runner.num_candidates)


def plan_of(seed: int, vocab: int, shapes: list[tuple[int, int]], params: list[SamplingParams], context: int):
    """Return a step of segments (new tokens, draft tokens) on random pages."""
    rng, first, segments = np.random.default_rng(seed), 0, []
    pages = rng.permutation(80).astype(np.int32)
    for i, (new_tokens, drafts) in enumerate(shapes):
        length = context + 7 * i
        need = -(-(length + new_tokens + drafts) // PAGE)
        mine, first = pages[first : first + need], first + need
        segments.append(
            Segment(
                tokens=rng.integers(0, vocab, new_tokens + drafts).astype(np.int32),
                parents=np.asarray([rng.integers(0, n + 1) for n in range(drafts)], dtype=np.int32),
                pages=mine,
                context=length,
                emits_tokens=True,
                wants_head_candidates=i % 3 < 2,
                output_index=seed,
                params=params[i % len(params)],
            )
        )
    return StepPlan(segments=segments)


def agreeable(runner: StepRunner, plan: StepPlan) -> StepPlan:
    """Return the plan with the model's own next token as the first draft token below each root."""
    twin = eager_twin(runner)
    result = twin.run(StepPlan(segments=[_without_drafts(s) for s in plan.segments]))
    for segment, found in zip(plan.segments, result, strict=True):
        for node in range(segment.num_draft_tokens):
            if segment.parents[node] == 0:
                segment.tokens[segment.num_new_tokens + node] = found.tokens[0]
                break
    return plan


def _without_drafts(segment: Segment) -> Segment:
    fields = {name: getattr(segment, name) for name in segment.__dataclass_fields__}
    fields |= {"tokens": segment.tokens[: segment.num_new_tokens], "parents": np.zeros(0, dtype=np.int32)}
    return Segment(**fields)


def assert_same(runner: StepRunner, twin: StepRunner, plan: StepPlan, limit: float = 0.0) -> int:
    """Assert equal results and caches that differ by at most ``limit``; returns the number of accepted draft tokens."""
    got, expected = runner.run(plan), twin.run(plan)
    assert [r.tokens for r in got] == [r.tokens for r in expected]
    assert [r.accepted_nodes for r in got] == [r.accepted_nodes for r in expected]
    for a, b in zip(got, expected, strict=True):
        assert (a.head_candidates is None) == (b.head_candidates is None)
        if a.head_candidates:
            assert np.array_equal(a.head_candidates.ids, b.head_candidates.ids)
            # A step with padding has more rows, which moves a product's last bits.
            np.testing.assert_allclose(a.head_candidates.logits, b.head_candidates.logits, rtol=0, atol=1e-5)
    assert runner.digest == twin.digest
    assert float((runner.cache.pages - twin.cache.pages).abs().max()) <= limit
    return sum(len(r.accepted_nodes) for r in got)


GREEDY, OPEN = SamplingParams(), SamplingParams(temperature=0.7, seed=3)
NUCLEUS = SamplingParams(temperature=0.9, top_p=0.8, seed=4)
TYPICAL = SamplingParams(temperature=0.9, seed=5, acceptance="typical")
STEPS = [
    ([(1, 3), (1, 0)], [GREEDY], 0),
    ([(1, 3), (1, 0)], [GREEDY], 40),
    ([(1, 0), (1, 3)], [GREEDY], 90),
    ([(1, 5), (1, 4), (1, 2)], [GREEDY, OPEN], 16),
    ([(1, 5), (1, 4), (1, 2)], [OPEN], 70),
    ([(1, 3), (1, 0)], [OPEN], 5),
    ([(1, 3), (1, 0)], [NUCLEUS, OPEN], 5),
    ([(1, 3), (1, 0)], [TYPICAL, NUCLEUS], 33),
    ([(5, 0), (1, 3)], [GREEDY], 17),
    ([(2, 1), (3, 3)], [OPEN], 3),
    ([(1, 3), (1, 0)], [GREEDY], 15),
    ([(30, 0), (1, 3)], [GREEDY], 0),
    (
        [(1, 12), (1, 12), (1, 11), (1, 11), (1, 12)],
        [GREEDY],
        2,
    ),  # the maximum number of rows, without room for padding
]
