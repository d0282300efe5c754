"""Every implementation of the kernels against the plainest possible loops."""

import functools

import numpy as np
import pytest
import torch

from euryale.kernels.accept import accept
from euryale.kernels.add_rms_norm import add_rms_norm
from euryale.kernels.commit import commit
from euryale.kernels.linear import FrozenLinear
from euryale.kernels.rope_qk import rope_qk
from euryale.kernels.silu_mul import silu_mul
from euryale.kernels.step_metadata import SegmentShape, StepMetadata, tree_tables
from euryale.kernels.tree_attention import tree_attention

CPU, PAGE, NUM_PAGES = torch.device("cpu"), 16, 100
DTYPES = (torch.float32, torch.bfloat16)
# The rounding of an output in its own dtype, 2^-24 and 2^-9, and some room for sums in another order.
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


every_implementation = pytest.mark.usefixtures("each_implementation")


def shapes(rng, kind: str) -> list[SegmentShape]:
    """Segments of one step; pages are dealt out in random order so that wrong page arithmetic shows."""
    cases = {
        "one token, no context": [(1, 0, [])],
        "one node": [(1, 33, [])],
        "chain": [(1, 17, [0, 1, 2, 3])],
        "tree of 64": [(1, 100, [0] * 9 + list(range(54)))],
        "tree of 128": [(1, 5, [0] * 9 + list(range(118)))],
        "prompt chunk": [(37, 0, []), (200, 64, [])],
        "one long, one short": [(1, 1100, [0, 0, 1]), (1, 15, [])],
        "all at once": [
            (1, 1000, [0, 0, 1, 1, 3]),
            (63, 0, []),
            (5, 63, [0, 1]),
            (1, 64, [0]),
            (1, 0, []),
            (130, 65, []),
        ],
    }[kind]
    pages, made = rng.permutation(NUM_PAGES).astype(np.int32), []
    for certain, context, parents in cases:
        need = -(-(context + certain + len(parents)) // PAGE)
        mine, pages = pages[:need], pages[need:]
        parents = np.asarray(parents, dtype=np.int32)
        made.append(SegmentShape(num_new_tokens=certain, context=context, parents=parents, pages=mine))
    return made


KINDS = ["one token, no context", "one node", "chain", "tree of 64", "tree of 128", "prompt chunk", "all at once"]


def attend_slowly(q, k, v, cache, segments, scale, window):
    """Row by row: gather what the row sees, softmax in float64."""
    out, row = torch.empty_like(q), 0
    groups = q.shape[1] // k.shape[1]
    for segment in segments:
        first, n = row, segment.num_new_tokens
        place = list(range(n))
        for parent in segment.parents.tolist():
            place.append(place[n - 1 + parent] + 1)
        seen_rows = [list(range(i + 1)) for i in range(n)]
        for node, parent in enumerate(segment.parents.tolist(), start=1):
            seen_rows.append([*seen_rows[n - 1 + parent], n - 1 + node])
        for i, seen in enumerate(seen_rows):
            position = segment.context + place[i]
            keys, values = [], []
            for j in range(segment.context):
                if window is None or position - j < window:
                    page, offset = int(segment.pages[j // PAGE]), j % PAGE
                    keys.append(cache[0, page, :, offset])
                    values.append(cache[1, page, :, offset])
            for j in seen:
                if window is None or place[i] - place[j] < window:
                    keys.append(k[first + j])
                    values.append(v[first + j])
            keys, values = torch.stack(keys).double(), torch.stack(values).double()
            for head in range(q.shape[1]):
                scores = keys[:, head // groups] @ q[first + i, head].double() * scale
                out[first + i, head] = (scores.softmax(0) @ values[:, head // groups]).to(q.dtype)
        row += segment.num_rows
    return out


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).square().mean().sqrt() / expected.double().square().mean().sqrt())


def attention_case(kind: str, heads: int, kv_heads: int, dim: int):
    """Segments, and random queries, scratch (a row longer than needed) and cache."""
    segments = shapes(np.random.default_rng(0), kind)
    rows = sum(s.num_rows for s in segments)
    torch.manual_seed(0)
    q, scratch = torch.randn(rows, heads, dim), torch.randn(2, rows + 1, kv_heads, dim)
    return segments, q, scratch, torch.randn(2, NUM_PAGES, kv_heads, PAGE, dim)


@functools.cache  # the same for every implementation
def expected_attention(kind: str, heads: int, kv_heads: int, dim: int, scale: float, window: int | None):
    segments, q, scratch, cache = attention_case(kind, heads, kv_heads, dim)
    k, v = scratch[:, : len(q)]
    return attend_slowly(q, k, v, cache, segments, scale, window).flatten(1)


@every_implementation
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_tree_attention(kind, window):
    segments, q, scratch, cache = attention_case(kind, 6, 2, 20)
    got = tree_attention(q, scratch, cache, StepMetadata.build(segments, PAGE, CPU), 0.3, window)
    expected = expected_attention(kind, 6, 2, 20, 0.3, window)
    # float32 against float64: rounding of sums over up to 1,000 keys stays below 1e-6; a wrong mask gives > 1e-2.
    assert relative_error(got, expected) < 2e-6
    # bfloat16 inputs have 8 bits: 2^-9 relative rounding of inputs and outputs.
    q, scratch, cache = (x.bfloat16() for x in (q, scratch, cache))
    low = tree_attention(q, scratch, cache, StepMetadata.build(segments, PAGE, CPU), 0.3, window)
    assert low.dtype == torch.bfloat16
    assert relative_error(low, expected) < 2e-2


@every_implementation
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (9, 1), (8, 2)])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_tree_attention_of_published_shapes(dim, heads):
    segments, q, scratch, cache = attention_case("one long, one short", *heads, dim)
    got = tree_attention(q, scratch, cache, StepMetadata.build(segments, PAGE, CPU), dim**-0.5, None)
    expected = expected_attention("one long, one short", *heads, dim, dim**-0.5, None)
    assert relative_error(got, expected) < 2e-6  # as above


@every_implementation
def test_a_row_of_attention_does_not_depend_on_its_neighbours_or_threads(request):
    if "reference" in request.node.name:
        pytest.skip("the reference pads segments to each other")
    segments, q, scratch, cache = attention_case("all at once", 6, 2, 40)
    together = tree_attention(q, scratch, cache, StepMetadata.build(segments, PAGE, CPU), 0.3)
    threads, row = torch.get_num_threads(), 0
    torch.set_num_threads(2)
    for segment in segments:
        mine = slice(row, row + segment.num_rows)
        metadata = StepMetadata.build([segment], PAGE, CPU)
        alone = tree_attention(q[mine], scratch[:, mine].contiguous(), cache, metadata, 0.3)
        assert torch.equal(alone, together[mine])
        row += segment.num_rows
    torch.set_num_threads(threads)


def test_positions_slots_and_bits():
    pages = np.asarray([7, 3], dtype=np.int32)
    tree = np.asarray([0, 0, 1], dtype=np.int32)
    metadata = StepMetadata.build([SegmentShape(num_new_tokens=2, context=14, parents=tree, pages=pages)], PAGE, CPU)
    assert metadata.positions.tolist() == [14, 15, 16, 16, 17]
    assert metadata.slots.tolist() == [7 * 16 + 14, 7 * 16 + 15, 3 * 16, 3 * 16, 3 * 16 + 1]
    assert metadata.parent_rows.tolist() == [-1, -1, 1, 1, 2]
    assert tree_tables(tree.tobytes())[1][:, 0].tolist() == [1, 0b11, 0b101, 0b1011]
    bad = SegmentShape(num_new_tokens=1, context=0, parents=np.asarray([1], dtype=np.int32), pages=pages)
    with pytest.raises(ValueError, match="parents come before"):
        StepMetadata.build([bad], PAGE, CPU)


@every_implementation
def test_commit_copies_the_rows_and_nothing_else():
    torch.manual_seed(0)
    cache, scratch = torch.randn(3, 2, 5, 2, PAGE, 4), torch.randn(3, 2, 9, 2, 4)
    expected, slots = cache.clone(), torch.full((6,), -1)
    for row, slot in {5: 4 * PAGE + 15, 0: 0, 3: 2 * PAGE + 7}.items():
        slots[row] = slot
        expected[:, :, slot // PAGE, :, slot % PAGE] = scratch[:, :, row]
    commit(cache, scratch, slots)
    assert torch.equal(cache, expected)
    commit(cache, scratch, torch.full((9,), -1))
    commit(cache, scratch, slots[:0])
    assert torch.equal(cache, expected)


@every_implementation
@pytest.mark.parametrize("is_typical", [False, True])
def test_accept_finds_the_deepest_then_likeliest_path(is_typical):
    rng = np.random.default_rng(1)
    deepest = 0
    for _ in range(200):
        segments, fits, scores, expected_last, expected_rows, first = [], [], [], [], set(), 0
        for _ in range(int(rng.integers(1, 5))):
            certain, drafts = int(rng.integers(1, 4)), int(rng.integers(0, 12))
            parents = np.asarray([rng.integers(0, i + 1) for i in range(drafts)], dtype=np.int32)
            pages = np.zeros(4, dtype=np.int32)
            segments.append(SegmentShape(num_new_tokens=certain, context=0, parents=parents, pages=pages))
            ok, score = rng.random(drafts) < 0.6, rng.integers(0, 3, size=drafts) * is_typical
            fits += [False] * certain + ok.tolist()
            scores += [0.0] * certain + score.tolist()
            paths = {0: []}
            for node in range(1, drafts + 1):
                if ok[node - 1] and int(parents[node - 1]) in paths:
                    paths[node] = [*paths[int(parents[node - 1])], node]
            end = max(paths, key=lambda n, s=score, p=paths: (len(p[n]), s[n - 1] if n else 0, -n))
            root = first + certain - 1
            expected_last.append(root + end)
            expected_rows |= set(range(first, root + 1)) | {root + n for n in paths[end]}
            deepest = max(deepest, len(paths[end]))
            first += certain + drafts
        metadata = StepMetadata.build(segments, PAGE, CPU)
        # Whether a draft fits is what the tokens say, or for half of the rows of a typical request `good`.
        next_tokens = torch.from_numpy(rng.integers(0, 50, first).astype(np.int32))
        wanted = next_tokens[metadata.parent_rows.clamp(min=0)]
        fits, typical = torch.tensor(fits), torch.from_numpy(rng.random(first) < 0.5) & is_typical
        tokens = torch.where(fits ^ typical, wanted, wanted + 1)
        good = torch.where(typical, fits.to(torch.int8), -1).to(torch.int8)
        extra = (good, torch.tensor(scores, dtype=torch.float32)) if is_typical else ()
        last, kept = accept(metadata, tokens, next_tokens, *extra)
        assert last.tolist() == expected_last
        expected = [slot if row in expected_rows else -1 for row, slot in enumerate(metadata.slots.tolist())]
        assert kept.tolist() == expected
    assert deepest >= 4


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("dim", [10, 64, 80])
def test_rope_is_that_of_transformers(dim, has_norm, dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    qkv, angles, norms = torch.randn(5, 8, dim).to(dtype), torch.randn(9, dim // 2), torch.rand(2, dim).to(dtype) + 0.5
    positions = torch.tensor([8, 0, 3, 3, 1])
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    scratch = torch.zeros(2, 6, 2, dim, dtype=dtype)
    q, k, v = (x.double() for x in qkv.split([4, 2, 2], dim=1))
    if has_norm:
        q, k = (torch.nn.functional.rms_norm(x, (dim,), w.double(), 1e-5) for x, w in zip((q, k), norms, strict=True))
    both_cos, both_sin = (torch.cat([x, x], dim=1)[positions].double() for x in (cos, sin))
    expected_q, expected_k = apply_rotary_pos_emb(
        q[None].transpose(1, 2), k[None].transpose(1, 2), both_cos[None], both_sin[None]
    )
    got = rope_qk(qkv.flatten(1), positions, cos, sin, scratch, *(norms if has_norm else (None, None)), 1e-5)
    limit = 3 * LIMITS[dtype]  # the reference rounds after every operation
    assert relative_error(got, expected_q[0].transpose(0, 1)) < limit
    assert relative_error(scratch[0, :5], expected_k[0].transpose(0, 1)) < limit
    assert torch.equal(scratch[1, :5], v.to(dtype))
    assert not scratch[:, 5].any()


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 72, 256])
def test_add_rms_norm(width, dtype):
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((5, width), (5, width), (width,)))
    for added in (residual, None):
        total = x.double() if added is None else x.double() + added.double()
        expected = torch.nn.functional.rms_norm(total, (width,), weight.double(), 1e-5)
        got, new = add_rms_norm(x.clone(), None if added is None else added.clone(), weight, 1e-5)
        assert relative_error(new, total) < LIMITS[dtype]
        assert relative_error(got, expected) < 2 * LIMITS[dtype]  # the sum is rounded before it is normed


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 130])
def test_silu_mul(width, dtype):
    torch.manual_seed(0)
    gate_up = torch.cat([torch.randn(5, width) * 20, torch.randn(5, width)], dim=1).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    limit = 3 * LIMITS[dtype]  # the reference rounds SiLU before the product
    assert relative_error(silu_mul(gate_up), torch.nn.functional.silu(gate) * up) < limit


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 9, 200])
@pytest.mark.parametrize("sizes", [(67, 33), (1, 1), (128, 64), (130, 70)])
def test_linear(sizes, rows, dtype):
    torch.manual_seed(0)
    out, width = sizes
    weight, bias, x = (torch.randn(shape).to(dtype) for shape in ((out, width), (out,), (rows, width)))
    for added in (bias, None):
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
        assert relative_error(FrozenLinear(weight, added)(x), expected) < LIMITS[dtype]
