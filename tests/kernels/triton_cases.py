"""The Triton kernels against the reference, run by test_triton.py in a process of its own: on a GPU compiled, without
one in Triton's interpreter, which has to be chosen before triton is imported."""

import os

import numpy as np
import pytest
import torch
from step_cases import GREEDY, STEPS, agreeable, assert_same, eager_twin, load_runner, plan_of

from euryale.kernels import backend, graph
from euryale.kernels.accept import accept
from euryale.kernels.add_rms_norm import add_rms_norm
from euryale.kernels.commit import commit
from euryale.kernels.linear import FrozenLinear
from euryale.kernels.rope_qk import rope_qk
from euryale.kernels.sample import sample
from euryale.kernels.sample.noise import stream_key
from euryale.kernels.silu_mul import silu_mul
from euryale.kernels.step_metadata import SegmentShape, StepMetadata
from euryale.kernels.top_k import merge_top_k, top_k, values_and_ids
from euryale.kernels.tree_attention import tree_attention, work_list
from euryale.runtime.step_graphs import StepGraphs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
assert DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1", "run test_triton.py"

if DEVICE.type == "cpu":
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_for_numpy(tensor, scope):
        """numpy from 2.4 on makes numbers of arrays without dimensions alone, triton 3.6 has one dimension there."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_for_numpy

PAGE = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# RMSE ratio of one rounding to the dtype (at most 2^-24, 2^-11, 2^-9; the interpreter may cut off, which doubles it)
# with room for sums in another order. A wrong mask, row or page gives more than 1e-2.
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def both(function, *arguments):
    """What Triton and what the reference make of copies of the same: results, and the arguments afterwards."""
    made = []
    for name in ("triton", "reference"):
        own = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        with backend.forced(name):
            made.append((function(*own), own))
    return made


def assert_close(name: str, got: torch.Tensor, expected: torch.Tensor, limit: float):
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
    got, expected = got.double(), expected.double()
    ratio = float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    assert ratio < limit, f"{name}: RMSE ratio {ratio:.2g}"  # NaN is not less than anything


def random(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def segments_of(*cases) -> list[SegmentShape]:
    """Segments (rows of known tokens, context, parents); pages in random order, so that wrong page arithmetic shows."""
    pages, made = np.random.default_rng(0).permutation(200).astype(np.int32), []
    for certain, context, parents in cases:
        need = -(-(context + certain + len(parents)) // PAGE)
        mine, pages = pages[:need], pages[need:]
        drafts = np.asarray(parents, dtype=np.int32)
        made.append(SegmentShape(num_new_tokens=certain, context=context, parents=drafts, pages=mine))
    return made


def build(segments: list[SegmentShape]) -> StepMetadata:
    """Their metadata, with all bits set where it leaves them unused: no kernel may read the rows of known tokens'
    ancestors."""
    metadata = StepMetadata.build(segments, PAGE, DEVICE)
    metadata.ancestors[metadata.parent_rows < 0] = -1
    return metadata


WIDE_64 = [0] * 9 + list(range(54))
DEEP_128 = [0] * 3 + list(range(124))
ATTENTION = {
    **{f"one node after {n}": [(1, n, [])] for n in (0, 1, 63, 64, 65, 1000)},
    "chain": [(1, 17, [0, 1, 2, 3])],
    "chain of 64": [(1, 511, list(range(63)))],
    "tree of 64": [(1, 65, WIDE_64)],
    "tree of 128": [(1, 5, DEEP_128)],
    "tree of 128, no context": [(1, 0, DEEP_128)],
    "tree over a cut": [(3, 505, [0, 0, 1, 1, 3, 5, 0])],
    "prompt chunk": [(70, 0, [])],
    "later chunk and tree": [(40, 33, [0, 0, 1])],
    "several": [(1, 1000, [0, 0, 1, 1, 3]), (33, 0, []), (5, 63, [0, 1]), (1, 64, [0]), (1, 0, []), (20, 65, [])],
}


def attention_case(step, heads: int, kv_heads: int, dim: int, dtype):
    """Metadata, queries with a row stride, scratch longer than needed, cache with NaN in pages of nobody."""
    segments, rows = segments_of(*step), sum(certain + len(parents) for certain, _, parents in step)
    torch.manual_seed(0)
    qkv, scratch = random(rows, heads + 2, dim, dtype=dtype), random(2, rows + 1, kv_heads, dim, dtype=dtype)
    cache = random(2, 200, kv_heads, PAGE, dim, dtype=dtype)
    unused = sorted(set(range(200)) - {int(p) for s in segments for p in s.pages})
    cache[:, unused[1:]] = torch.nan  # the reference's padding reads page 0
    cache[:, 0].nan_to_num_()
    scratch[:, rows:] = torch.nan
    return build(segments), qkv[:, :heads], scratch, cache


def check_attention(metadata, q, scratch, cache, window):
    (got, _), _ = both(tree_attention, q, scratch, cache, metadata, q.shape[2] ** -0.5, window)
    exact = [x.float() for x in (q, scratch, cache)]
    with backend.forced("reference"):
        expected = tree_attention(*exact, metadata, q.shape[2] ** -0.5, window)
    # Low precision: the weights are rounded once more before they meet the values; in float32 up to 1,000 terms add up.
    assert_close("attention", got, expected.to(q.dtype), 2 * LIMITS[q.dtype])


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("step", ATTENTION)
def test_tree_attention(step, window):
    check_attention(*attention_case(ATTENTION[step], 6, 2, 20, torch.float32), window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_tree_attention_of_published_head_dims(dim, dtype):
    check_attention(*attention_case([(1, 520, [0, 0, 1]), (18, 15, [0])], 4, 1, dim, dtype), None)


@pytest.mark.parametrize("heads", [(1, 1), (9, 1), (8, 8)])
def test_tree_attention_of_head_groups(heads):
    check_attention(*attention_case([(1, 520, [0, 0, 1]), (18, 15, [0])], *heads, 32, torch.bfloat16), 30)


@pytest.mark.parametrize("window", [None, 40])
def test_large_tiles_in_low_precision(window, monkeypatch):
    """The tiles of prompts, with a split short enough for a test."""
    tiles = {dim: (*row[:2], work_list.Tile(64, 32, 64, 4, 1)) for dim, row in work_list._TILES.items()}
    monkeypatch.setattr(work_list, "_TILES", tiles)
    check_attention(*attention_case([(70, 47, [0, 1, 1])], 8, 1, 24, torch.bfloat16), window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_attention_does_not_depend_on_its_neighbours(dtype):
    step, row = ATTENTION["several"], 0
    metadata, q, scratch, cache = attention_case(step, 6, 2, 40, dtype)
    with backend.forced("triton"):
        together = tree_attention(q, scratch, cache, metadata, 0.3)
        for segment in metadata.segments:
            mine = slice(row, row + segment.num_rows)
            alone = build([segment])
            got = tree_attention(q[mine], scratch[:, mine].contiguous(), cache, alone, 0.3)
            assert torch.equal(got, together[mine])
            row += segment.num_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (2, 80), (12, 128)])
def test_commit(shape, dtype):
    torch.manual_seed(0)
    heads, dim = shape
    cache, scratch = random(3, 2, 5, heads, PAGE, dim, dtype=dtype), random(3, 2, 9, heads, dim, dtype=dtype)
    slots = torch.tensor([4 * PAGE + 15, -1, 0, -1, 2 * PAGE + 7], device=DEVICE)
    for n in (5, 2):
        (_, got), (_, expected) = both(commit, cache, scratch, slots[:n])
        assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("is_typical", [False, True])
def test_accept(is_typical):
    rng = np.random.default_rng(1)
    sizes = [
        *[(int(rng.integers(1, 4)), int(rng.integers(0, 12))) for _ in range(60)],
        (1, 127),
        (30, 127),
        (3, 127),
        (2, 63),
    ]
    for width in (1, 3, len(sizes)):
        for at in range(0, len(sizes), width):
            step = [
                (certain, 0, [int(rng.integers(max(0, i - 5), i + 1)) for i in range(drafts)])
                for certain, drafts in sizes[at : at + width]
            ]
            segments = [
                SegmentShape(
                    num_new_tokens=c, context=0, parents=np.asarray(p, dtype=np.int32), pages=np.zeros(30, "i4")
                )
                for c, _, p in step
            ]
            metadata = build(segments)
            rows = metadata.num_rows
            # Of two tokens, most drafts have the one that is wanted.
            tokens, wanted = (torch.from_numpy(rng.random(rows) < p).to(DEVICE, torch.int32) for p in (0.9, 0.95))
            good = torch.from_numpy(rng.integers(-1, 2, rows)).to(DEVICE, torch.int8)
            scores = torch.from_numpy(rng.integers(-1, 2, rows)).to(DEVICE, torch.float32)  # many ties
            scores[scores < 0] = -torch.inf
            extra = (good, scores) if is_typical else ()
            (got, _), (expected, _) = both(accept, metadata, tokens, wanted, *extra)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("dim", [10, 64, 80, 96, 256])
def test_rope_qk(dim, has_norm, dtype):
    torch.manual_seed(0)
    heads, kv_heads, rows = 9, 3, 5
    qkv, angles = random(rows, (heads + 2 * kv_heads) * dim, dtype=dtype), random(9, dim // 2)
    positions = torch.tensor([8, 0, 3, 3, 1], device=DEVICE)
    scratch = torch.zeros(2, rows + 1, kv_heads, dim, dtype=dtype, device=DEVICE)
    norms = (random(dim, dtype=dtype), random(dim, dtype=dtype)) if has_norm else (None, None)
    arguments = (qkv, positions, angles.cos().to(dtype), angles.sin().to(dtype), scratch, *norms, 1e-5)
    (got_q, got), (expected_q, expected) = both(rope_qk, *arguments)
    limit = 3 * LIMITS[dtype]  # the reference rounds after every operation
    assert_close("q", got_q, expected_q, limit)
    assert_close("k", got[4][0, :rows], expected[4][0, :rows], limit)
    assert torch.equal(got[4][1], expected[4][1])
    assert not got[4][0, rows:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 72, 256, 5000])
def test_add_rms_norm(width, dtype):
    torch.manual_seed(0)
    x, residual, weight = random(5, width, dtype=dtype), random(5, width, dtype=dtype), random(width, dtype=dtype)
    for added in (residual, None):
        ((normed, total), _), ((expected, expected_total), _) = both(add_rms_norm, x, added, weight, 1e-5)
        assert_close("sum", total, expected_total, LIMITS[dtype])
        assert_close("norm", normed, expected, 2 * LIMITS[dtype])  # the sum is rounded before it is normed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 130, 2500])
def test_silu_mul(width, dtype):
    torch.manual_seed(0)
    gate_up = torch.cat([random(5, width) * 20, random(5, width)], dim=1).to(dtype)
    (got, _), (expected, _) = both(silu_mul, gate_up)
    assert_close("gate", got, expected, 3 * LIMITS[dtype])  # the reference rounds SiLU before the product


def test_products_are_those_of_the_reference():
    x, weight, bias = random(3, 20), random(7, 20), random(7)
    (got, _), (expected, _) = both(lambda *a: FrozenLinear(a[1], a[2])(a[0]), x, weight, bias)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "k"), [(1, 1), (5, 9), (2500, 7), (5000, 1)])
def test_top_k_and_merging(width, k, dtype):
    torch.manual_seed(0)
    x = (torch.randn(3, width) * 3).round().to(DEVICE, dtype)  # many ties
    x[1] = -torch.inf
    (got, _), (expected, _) = both(top_k, x, k, max(1, width - 3), 100)
    assert torch.equal(got[0], expected[0])
    found = values_and_ids(expected)[0] > -torch.inf
    assert torch.equal(got[1][found], expected[1][found])
    (got, _), (expected, _) = both(merge_top_k, torch.stack([expected, expected]))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1][found], expected[1][found])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample(dtype):
    torch.manual_seed(0)
    logits = random(8, 3000, dtype=dtype) * 3
    temperature = torch.tensor([0.0, 0.3, 1.0, 2.0] * 2, device=DEVICE)
    keys = torch.tensor([stream_key(row % 7, 0, row) for row in range(8)], device=DEVICE)
    (got, _), (expected, _) = both(sample, logits, temperature, keys, 2990, 7000)
    # The second largest of 3,000 scores is much further away than the logarithms differ.
    assert torch.equal(got[1], expected[1])
    assert_close("scores", values_and_ids(got)[0], values_and_ids(expected)[0], 1e-6)


class Repeated:
    """In place of a CUDA graph: the function once more, on whatever its tensors hold by then."""

    def __init__(self, function, _device) -> None:
        self._function, self.out = function, function()

    def replay(self) -> int:
        self.out = self._function()
        return 0


def test_padded_steps(tmp_path, monkeypatch):
    """Whole decoding steps in padded batches that are filled again and again find what unpadded ones find: on a GPU as
    CUDA graphs, elsewhere without a recording."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(graph, "record", Repeated)
    with backend.forced("triton"):
        runner = load_runner(tmp_path, DEVICE.type, vocab=301)
        runner.graphs = StepGraphs(runner.cache, runner.decoder.shard.group, max_rows=64, pads=True)
        twin, recorded = eager_twin(runner), 0
        # The interpreter takes long for the largest step.
        chosen = (0, 1, 3, 6, 8) if DEVICE.type == "cpu" else (0, 1, 3, 6, 8, 12)
        for seed, (shapes, params, context) in enumerate(STEPS[i] for i in chosen):
            plan = plan_of(seed, runner.decoder.shard.vocab_size, shapes, params, context)
            # PyTorch's products may sum another number of rows in another order, on some CPUs too.
            limit = 1e-5 if DEVICE.type == "cpu" else 1e-4
            assert_same(runner, twin, agreeable(runner, plan) if params == [GREEDY] else plan, limit)
            recorded += runner.graphs.recording(plan) is not None
        assert recorded == len(chosen) - 1  # prompts are not


def test_a_context_that_outgrows_its_work_list_is_recorded_again(tmp_path, monkeypatch):
    """... and nothing is lost when the only recording is replaced."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(graph, "record", Repeated)
    limits = work_list._TILES_FLOAT32
    monkeypatch.setattr(work_list, "_TILES_FLOAT32", tuple(work_list.Tile(16, 16, 16, 8, 1) for _ in limits))
    with backend.forced("triton"):
        runner = load_runner(tmp_path, DEVICE.type, vocab=301)
        runner.graphs = StepGraphs(runner.cache, runner.decoder.shard.group, max_rows=64, pads=True, max_graphs=1)
        twin, recordings = eager_twin(runner), []
        for seed, context in enumerate((5, 7, 60, 200)):
            plan = plan_of(seed, runner.decoder.shard.vocab_size, [(1, 3)], [GREEDY], context)
            assert_same(runner, twin, plan, 1e-5 if DEVICE.type == "cpu" else 1e-4)
            recordings.append(runner.graphs.recording(plan))
        assert len({id(r) for r in recordings}) == 3  # one split, several, and more than there was room for
