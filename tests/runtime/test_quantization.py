"""Quantized weights: trees, group sizes and recordings change no token, and unsupported settings are refused."""

import pytest
import torch
from support import answer, family_config, head_tensors, make_model, prompts, save_heads

from euryale.kernels import backend
from euryale.parallel.group import single
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine
from euryale.scheduler.sampling_params import SamplingParams

LENGTH = 20
# Inputs of o_proj and down_proj divide into groups of 32 on two ranks; everything else is odd.
SIZES = {"head_dim": 32, "intermediate_size": 192}


@pytest.fixture(scope="module", params=["tied", "own"])
def model(request, tmp_path_factory):
    """A directory and its heads': with an lm_head tied to the embedding, or with lm_heads of their own everywhere."""
    directory = tmp_path_factory.mktemp("model")
    is_tied = request.param == "tied"
    made = make_model(directory, family_config("llama", tie_word_embeddings=is_tied, **SIZES))
    return directory, save_heads(directory / "heads", head_tensors(made, num_layers=2, own_lm_head=not is_tied))


def config(model, **changes) -> EngineConfig:
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 40, "dtype": "float32", "tree": "static"} | changes
    return EngineConfig(model=str(model[0]), medusa=str(model[1]), **settings)


def run(ranks, size, model, **changes):
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True)
    return ranks(size).run(answer, config(model, **changes), [(p, params) for p in prompts(8)])[0]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_no_setting_changes_greedy_tokens(model, ranks, kind):
    plain = run(ranks, 1, model, quantization=kind, tree="off")
    assert plain["outputs"] != run(ranks, 1, model, tree="off")["outputs"], "nothing was quantized"
    for size, changes in ((1, {}), (1, {"eager": True}), (2, {"tree": "off"}), (2, {})):
        got = run(ranks, size, model, quantization=kind, **changes)
        assert got["outputs"] == plain["outputs"], (size, changes)
    # If no draft token were accepted, equal outputs would not test trees.
    assert sum(map(len, got["tokens_per_step"])) < sum(map(len, plain["tokens_per_step"])), "no draft was accepted"


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_reference_gives_the_same_logits(model, kind):
    """Of every matrix: the backbone's, the heads' blocks and lm_heads."""
    torch.manual_seed(0)
    hidden, rows = torch.randn(3, 72), torch.tensor([0, 2], dtype=torch.int32)
    with torch.inference_mode():
        ours = Engine(config(model, quantization=kind), single()).runner
        with backend.forced("reference"):
            theirs = Engine(config(model, quantization=kind), single()).runner
            expected = theirs.decoder.logits(hidden), theirs.heads.logits(hidden, rows)
        # float32 sums of 72 products in another order.
        torch.testing.assert_close(ours.decoder.logits(hidden), expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.heads.logits(hidden, rows), expected[1], rtol=1e-4, atol=1e-4)
        names = {type(linear._weight).__name__ for linear in (ours.decoder.lm_head, ours.heads.blocks[0][0])}
    assert names == {"Packed"}
    assert ours.decoder.embed_tokens.weight.dtype == torch.float32


def refusal(group, config) -> str:
    try:
        Engine(config, group)
    except ValueError as error:
        return str(error)
    return ""


def test_groups_of_inputs_that_ranks_would_cut_are_refused(ranks, tmp_path):
    directory = tmp_path / "model"
    made = make_model(directory, family_config("llama"))
    odd = directory, save_heads(directory / "heads", head_tensors(made))
    run(ranks, 1, odd, quantization="int4")  # alone, any width goes
    for said in ranks(2).run(refusal, config(odd, quantization="int4")):
        assert "in groups of 32 inputs, which a rank's shard of 48 of 96 inputs would cut: use fewer ranks" in said
    plain = run(ranks, 1, odd, quantization="int8", tree="off")
    assert run(ranks, 2, odd, quantization="int8")["outputs"] == plain["outputs"]


def test_fp8_is_refused_on_a_cpu(model):
    with pytest.raises(ValueError, match=r"--quantization fp8 needs a GPU"):
        Engine(config(model, quantization="fp8"), single())


def test_the_fingerprint_names_the_quantization(model):
    found = {Engine(config(model, quantization=kind), single()).loaded.fingerprint for kind in ("none", "int8", "int4")}
    assert len(found) == 3
