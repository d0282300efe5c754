"""Penalties, biases, minimal lengths and log-probabilities with trees are those of decoding token by token."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import HEAD_DIM, KV_HEADS, answer, family_config, head_tensors, make_model, prompts, save_heads
from textbook import adjusted, decode, typical_by_hand

from euryale.parallel.group import Group, single
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.config import EngineConfig
from euryale.runtime.kv_cache import GIB
from euryale.runtime.sampling.acceptance import decide
from euryale.runtime.sampling.logits_processors import process_logits
from euryale.runtime.step_batch import StepBatch
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.step_plan import Segment, StepPlan

VOCAB, LENGTH, END = 41, 24, 2  # few tokens: answers repeat some, and wide trees contain many correct draft tokens
WIDE = [[a] for a in range(20)] + [[a, b] for a in range(8) for b in range(7)]
WIDE += [[a, b, c] for a in range(3) for b in range(4) for c in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adjusted")
    made = make_model(directory, family_config("llama", vocab_size=VOCAB), seed=5)
    heads = save_heads(directory / "heads", head_tensors(made, num_layers=2))
    (heads / "tree.json").write_text(json.dumps(WIDE))
    return directory, heads, made


def assert_logprobs(got, logits: torch.Tensor, tokens: list[int], count: int) -> None:
    """Log-probabilities of the tokens and of the ``count`` likeliest under raw logits [T, V]. Two float32 models agree
    to about 1e-5 in logits of this size; ties among the likeliest may swap within that."""
    assert len(got) == len(tokens)
    expected = logits.double().log_softmax(-1)
    for row, token, found in zip(expected, tokens, got, strict=True):
        assert abs(found.logprob - float(row[token])) < 1e-4
        assert len(found.top) == count
        np.testing.assert_allclose([v for _, v in found.top], row.topk(count).values, atol=1e-4)
        np.testing.assert_allclose([v for _, v in found.top], [float(row[i]) for i, _ in found.top], atol=1e-4)


def run(ranks, size, model, wanted, **changes):
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 600, "dtype": "float32", "tree": "static"} | changes
    config = EngineConfig(model=str(model[0]), medusa=str(model[1]), **settings)
    return ranks(size).run(answer, config, wanted)[0]


def request(i: int, **params) -> tuple[np.ndarray, SamplingParams]:
    return prompts(8, VOCAB)[i % 8], SamplingParams(**{"max_tokens": LENGTH, "ignore_eos": True, "seed": i} | params)


BIAS = tuple((token, 3.0 if token % 3 else -100.0) for token in range(7, 30))
MIXED = [
    request(0, presence_penalty=1.5),
    request(1),
    request(2, frequency_penalty=0.7, temperature=0.6),
    request(3, repetition_penalty=1.3),
    request(4, temperature=0.8),
    request(5, repetition_penalty=0.8, temperature=0.9, top_k=20, logprobs=3),
    request(6, logit_bias=BIAS, presence_penalty=-1.0, prompt_logprobs=2),
    request(7, temperature=0.5, logit_bias=BIAS, frequency_penalty=-0.5, repetition_penalty=1.1, logprobs=0),
    request(7, min_tokens=9, ignore_eos=False, logit_bias=((END, 40.0),), logprobs=20, prompt_logprobs=0),
    request(2, min_tokens=5, stop_token_ids=tuple(range(3, 30)), temperature=1.3),
    request(3, presence_penalty=2.0, frequency_penalty=2.0, speculation=False, logprobs=1),
    request(4, logprobs=5, prompt_logprobs=5, temperature=0.7),
]


def assert_all_right(model, wanted, out) -> None:
    for i, (prompt, params, *sample) in enumerate(wanted):
        tokens, raw = decode(model[2], prompt, params, {END}, *sample)
        assert out["outputs"][i] == tokens, (i, params)
        if params.logprobs is None:
            assert not out["logprobs"][i]
        else:
            assert_logprobs(out["logprobs"][i], raw, tokens, params.logprobs)
        if params.prompt_logprobs is None:
            assert not out["prompt_logprobs"][i]
        else:
            with torch.no_grad():
                logits = model[2](torch.from_numpy(prompt)[None].long()).logits[0, :-1]
            assert_logprobs(out["prompt_logprobs"][i], logits, prompt[1:].tolist(), params.prompt_logprobs)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {}),
        (2, {}),
        (1, {"tree": "off"}),
        (2, {"tree": "chain", "max_num_batched_tokens": 24}),
        (1, {"max_num_seqs": 2, "eager": True}),
        (1, {"loop": "overlapped"}),
        (2, {"tree": "dynamic:40", "max_num_batched_tokens": 200}),
    ],
)
def test_a_mixed_batch_is_token_by_token_decoding(model, ranks, size, changes):
    out = run(ranks, size, model, MIXED, **changes)
    assert_all_right(model, MIXED, out)
    if not changes:
        drafts = [sum(accepted) - len(accepted) for accepted in out["tokens_per_step"]]
        assert sum(count > 0 for count in drafts) >= 10, "too few draft tokens were accepted"
        assert all(len(accepted) > 2 for accepted in out["tokens_per_step"]), "too few draft tokens were rejected"


@pytest.mark.parametrize("size", [1, 2])
def test_preempted_requests_are_token_by_token_decoding(model, ranks, size):
    """With few pages some tokens are computed twice, and their log-probabilities are returned once."""
    page = 2 * 2 * 8 * HEAD_DIM * KV_HEADS // size * 4  # bytes: layers, K and V, tokens, values
    wanted = [(prompt, dataclasses.replace(params, priority=-i)) for i, (prompt, params) in enumerate(MIXED)]
    out = run(ranks, size, model, wanted, page_size=8, kv_cache_memory=24.5 * page / GIB)
    assert sum(out["preempted"]) > 0
    assert_all_right(model, wanted, out)


numbers = st.floats(-2, 2)
some_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(4, 14),
    temperature=st.sampled_from([0.0, 0.0, 0.4, 1.0]),
    top_k=st.sampled_from([0, 0, 10]),
    seed=st.integers(0, 2**64 - 1),
    presence_penalty=st.just(0.0) | numbers,
    frequency_penalty=st.just(0.0) | numbers,
    repetition_penalty=st.just(1.0) | st.floats(0.5, 2),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=6).map(lambda d: tuple(d.items())),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    speculation=st.sampled_from([True, True, True, False]),
)
some_requests = st.tuples(st.integers(0, 7).map(lambda i: prompts(8, VOCAB)[i]), some_params, st.integers(0, 3))


@settings(max_examples=15, deadline=None)  # deadlines measure the machine
@given(st.lists(some_requests, min_size=1, max_size=6), st.sampled_from([1, 2]), st.sampled_from([30, 200]))
def test_any_mixture_is_token_by_token_decoding(model, ranks, wanted, size, rows):
    changes = {"max_num_batched_tokens": rows, "tree": "static" if rows > len(WIDE) else "dynamic:20"}
    assert_all_right(model, wanted, run(ranks, size, model, wanted, **changes))


def test_samples_of_one_prompt_draw_independently_and_use_its_pages(model, ranks):
    prompt, params = request(7, temperature=1.2, frequency_penalty=0.3, logprobs=1)
    wanted = [(prompt, params, sample) for sample in range(4)]
    out = run(ranks, 1, model, wanted)
    assert_all_right(model, wanted, out)
    assert len({tuple(tokens) for tokens in out["outputs"]}) == 4
    assert out["shared"] == 3 * (len(prompt) - 1) // 16 * 16


def random_segment(rng, params: SamplingParams, vocab: int) -> tuple[Segment, list[int], list[int]]:
    """A tree of repeated tokens below a random prompt and answer; also both of these."""
    prompt = rng.integers(0, vocab, rng.integers(1, 9))
    output = rng.integers(0, vocab, rng.integers(0, 9)).tolist()
    owner = Request(key=0, prompt=prompt.astype(np.int32), params=params, output=output)
    num_nodes = int(rng.integers(1, 90))
    parents = np.asarray([rng.integers(max(0, node - 4), node) for node in range(1, num_nodes)], dtype=np.int32)
    segment = Segment(
        tokens=np.asarray([[*prompt, *output][-1], *rng.integers(0, vocab, num_nodes - 1)], dtype=np.int32),
        parents=parents,
        pages=np.zeros(12, dtype=np.int32),
        context=len(prompt) + len(output) - 1,
        emits_tokens=True,
        wants_head_candidates=False,
        output_index=len(output),
        params=params,
        logits_inputs=owner.logits_inputs(1, True, frozenset([END])),
    )
    return segment, prompt.tolist(), output


def by_hand(segment: Segment, logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
    """Every node's logits [T, V] adjusted by its own path."""
    paths = [[]]
    for node, parent in enumerate(segment.parents, start=1):
        paths.append([*paths[parent], int(segment.tokens[node])])
    rows = [
        adjusted(row, segment.params, prompt, output + path, {END}) for row, path in zip(logits, paths, strict=True)
    ]
    return torch.stack(rows)


def test_every_node_has_its_own_path_as_history():
    """Deep trees over few tokens, on every shard of 1 and 3. The reference rounds in another order: 1e-5 of logits
    up to 10 with biases up to 5."""
    rng, vocab = np.random.default_rng(0), 10
    torch.manual_seed(0)
    for trial in range(60):
        params = SamplingParams(
            presence_penalty=float(rng.uniform(-2, 2)),
            frequency_penalty=float(rng.uniform(-2, 2)),
            repetition_penalty=float(rng.uniform(0.5, 2)),
            logit_bias=((3, 2.5), (9, -5.0)) if trial % 2 else (),
            min_tokens=int(rng.integers(0, 20)),
        )
        segment, prompt, output = random_segment(rng, params, vocab)
        logits = torch.randn(len(segment.tokens), vocab) * 3
        expected = by_hand(segment, logits, prompt, output)
        batch = StepBatch.of(StepPlan(segments=[segment]), 16, torch.device("cpu"))
        for size in (1, 3):
            length, found = -(-vocab // size), []
            padded = torch.nn.functional.pad(logits, (0, length * size - vocab))
            for rank in range(size):
                shard = VocabShard(Group(rank, size, torch.device("cpu")), vocab, length)
                found.append(process_logits(shard, padded[:, rank * length :][:, :length].clone(), batch))
            torch.testing.assert_close(torch.cat(found, dim=1)[:, :vocab], expected, rtol=0, atol=1e-5)


def test_typical_acceptance_judges_the_adjusted_distribution():
    rng, vocab, lengths = np.random.default_rng(1), 12, []
    torch.manual_seed(1)
    shard = VocabShard(single(), vocab, vocab)
    for trial in range(60):
        params = SamplingParams(
            temperature=0.8,
            seed=trial,
            acceptance="typical",
            frequency_penalty=0.5,
            repetition_penalty=1.4,
            min_tokens=8,
            logit_bias=((5, 3.0),),
        )
        segment, prompt, output = random_segment(rng, params, vocab)
        logits = torch.randn(len(segment.tokens), vocab) * 2
        batch = StepBatch.of(StepPlan(segments=[segment]), 16, torch.device("cpu"))
        got = decide(shard, process_logits(shard, logits.clone(), batch), batch)
        shaped = by_hand(segment, logits, prompt, output)
        path, bonus = typical_by_hand(shaped, segment.tokens, segment.parents.tolist(), params, len(output))
        kept = [node for node, slot in enumerate(got.commit_slots.tolist()) if slot >= 0]
        assert kept == [0, *path]
        assert int(got.next_tokens[got.last_rows[0]]) == bonus
        lengths.append(len(path))
    assert max(lengths) >= 4
    assert min(lengths) == 0
