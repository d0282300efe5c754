"""Bad checkpoints, heads and settings are refused with the reason; good ones of every format load."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import answer, family_config, head_tensors, make_model, oracle_greedy, prompts, save_heads
from vocabularies import vocabulary

from euryale.frontend.tokenizer import load_tokenizer
from euryale.parallel.group import single
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine
from euryale.runtime.model import generation_config
from euryale.runtime.model.config import load_model_config
from euryale.scheduler.sampling_params import SamplingParams

LENGTH = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    model = make_model(directory, family_config("llama"), shard_size="700KB")
    assert (directory / "model.safetensors.index.json").is_file()
    save_heads(directory / "heads", head_tensors(model))
    return directory, model


@pytest.fixture
def copy(base, tmp_path):
    """A copy of the model that a test may break."""
    directory = tmp_path / "model"
    shutil.copytree(base[0], directory)
    return directory


def engine(model, **settings) -> Engine:
    return Engine(EngineConfig(model=str(model), **({"dtype": "float32", "max_num_seqs": 4} | settings)), single())


def refused(message: str, model, **settings):
    with pytest.raises(ValueError, match=message):
        engine(model, **settings)


def rewrite(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def set_config(directory, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_files(copy, tmp_path):
    refused("holds no config.json", tmp_path / "nowhere")
    (copy / "model.safetensors.index.json").rename(tmp_path / "index.json")
    refused("has neither model.safetensors nor", copy)
    (tmp_path / "index.json").rename(copy / "model.safetensors.index.json")
    next(iter(sorted(copy.glob("model-0*.safetensors")))).unlink()
    refused("is missing or damaged", copy)


def test_a_truncated_file(copy):
    path = sorted(copy.glob("model-0*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1000])
    refused("is missing or damaged", copy)


def test_a_damaged_index_and_config(copy):
    index = copy / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text("{")
    refused("index.json is damaged", copy)
    index.write_text(text.replace("model.norm.weight", "model.norm.wait"))
    refused("lacks model.norm.wait, which the index promises", copy)
    index.write_text(text)
    (copy / "config.json").write_text("{")
    refused("config.json is damaged", copy)


def test_tensors_that_do_not_fit_the_config(copy):
    set_config(copy, intermediate_size=128)
    refused("mlp.gate_proj.weight .* has shape .*130, 72.* but the configuration says .*128, 72", copy)
    set_config(copy, intermediate_size=130, num_hidden_layers=3)
    refused("has no tensor model.layers.2", copy)
    set_config(copy, num_hidden_layers=1)
    refused("holds 9 tensors this model does not know", copy)


def test_biases_that_the_family_has_must_be_there(tmp_path):
    make_model(tmp_path, family_config("qwen2"))
    rewrite(tmp_path / "model.safetensors", lambda t: [t.pop(n) for n in list(t) if n.endswith("proj.bias")])
    refused("has no tensor model.layers.0.self_attn.q_proj.bias", tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": 3}'])
def test_an_index_that_is_none(copy, content):
    (copy / "model.safetensors.index.json").write_text(content)
    refused("index.json(:| is damaged).* must ", copy)


@pytest.mark.parametrize("content", [[1], {"0.0.linear.weight": "text"}])
def test_a_heads_file_of_something_else(base, tmp_path, content):
    torch.save(content, tmp_path / "medusa_lm_head.pt")
    refused("does not hold tensors by name", base[0], medusa=str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": "wide"},
            "config.json: hidden_size must be a whole number from 1 to .*, not 'wide': correct it",
        ),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads must be"),
        ({"max_position_embeddings": 100}, "--max-model-len 600 is more than the 100 tokens"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is not supported"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256}}
            | {"max_position_embeddings": 1024},
            "give --max-model-len 256 or less",
        ),
    ],
)
def test_models_that_are_not_supported(copy, changes, message):
    set_config(copy, **changes)
    refused(message, copy, max_model_len=600)


def test_dynamic_rope_within_the_original_length(copy):
    set_config(copy, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert engine(copy).loaded.limits.max_model_len == 512


def test_heads_that_do_not_fit(base, tmp_path):
    directory, model = base
    good = head_tensors(model)

    def tries(message, change):
        tensors = dict(good)
        change(tensors)
        refused(message, directory, medusa=str(save_heads(tmp_path / "heads", tensors)))

    tries(
        "has shape .*71, 72.* trained for another model", lambda t: t.update({"0.0.linear.weight": torch.zeros(71, 72)})
    )
    tries("has shape .*3000, 72.* trained for another model", lambda t: t.update({"2.1.weight": torch.zeros(3000, 72)}))
    tries("1.0.linear.bias is missing", lambda t: t.pop("1.0.linear.bias"))
    tries("only some heads have an lm_head", lambda t: t.pop("1.1.weight"))
    tries(
        "numbered .*0, 1, 7",
        lambda t: [t.update({k.replace("2.", "7.", 1): t.pop(k)}) for k in [k for k in t if k[0] == "2"]],
    )
    tries("tensor extra is not part of Medusa heads", lambda t: t.update(extra=torch.zeros(1)))
    (tmp_path / "heads" / "medusa_lm_head.safetensors").write_bytes(b"nonsense")
    refused("are damaged", directory, medusa=str(tmp_path / "heads"))
    refused("holds neither medusa_lm_head.safetensors", directory, medusa=str(tmp_path))


def test_a_pickle_that_runs_code_is_refused(base, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"0.0.linear.weight": Evil()}, tmp_path / "medusa_lm_head.pt")
    refused("not a plain file of tensors|are damaged", base[0], medusa=str(tmp_path))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tree": "nowhere.json"}, "cannot read nowhere.json .*give --tree dynamic"),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 2, "tree": "static"}, "16 nodes and a step 8 rows"),
        ({"kv_cache_memory": 1e-9}, "hold no KV page"),
        ({"starvation_bound": -1}, "--starvation-bound must be a whole number of steps from 0 to"),
        ({"max_num_batched_tokens": 2, "max_num_seqs": 3}, "must be at least --max-num-seqs"),
    ],
)
def test_settings_that_cannot_work(base, settings, message):
    refused(message, base[0], medusa=str(base[0] / "heads"), **settings)


def test_a_tree_needs_heads_and_not_more_depth_than_heads(base, tmp_path):
    refused("needs Medusa heads", base[0], tree="chain")
    (tmp_path / "deep.json").write_text("[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]")
    refused(
        "has depth 4 but there are 3 Medusa heads",
        base[0],
        medusa=str(base[0] / "heads"),
        tree=str(tmp_path / "deep.json"),
    )


def refusal(group, directory):
    try:
        Engine(EngineConfig(model=str(directory), dtype="float32"), group)
    except ValueError as error:
        return str(error)
    return "loaded"


def test_every_rank_refuses_and_says_what_would_work(ranks, tmp_path):
    make_model(tmp_path, family_config("llama", num_attention_heads=3, num_key_value_heads=1))
    answers = ranks(2).run(refusal, tmp_path)
    assert answers == ["3 query heads cannot be divided among 2 ranks: use 1, 3"] * 2


def save_as(kind: str, base, where):
    """Heads in format A (.pt), B or C; returns the engine settings that use them."""
    directory, model = base
    if kind == "A":
        where.mkdir()
        torch.save(head_tensors(model), where / "medusa_lm_head.pt")
        (where / "config.json").write_text(
            '{"medusa_num_heads": 2, "medusa_num_layers": 7}'
        )  # wrong, as published ones
        return {"model": str(directory), "medusa": str(where)}
    if kind == "B":
        return {"model": str(directory), "medusa": str(save_heads(where, head_tensors(model, own_lm_head=False)))}
    shutil.copytree(directory, where, ignore=shutil.ignore_patterns("heads", "*.safetensors*"))
    layers = 0 if kind == "C without blocks" else 2
    merged = {f"medusa_head.{k}": v for k, v in head_tensors(model, num_layers=layers).items()}
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(tensors | merged, where / "model.safetensors")
    return {"model": str(where)}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["A", "B", "C", "C without blocks"])
def test_every_format_of_heads(base, ranks, tmp_path, kind, size):
    settings = save_as(kind, base, tmp_path / "out")
    asked = prompts(3)
    config = EngineConfig(**settings, dtype="float32", max_num_seqs=4, tree="static")
    wanted = [(p, SamplingParams(max_tokens=LENGTH, ignore_eos=True)) for p in asked]
    got = ranks(size).run(answer, config, wanted)[0]
    assert got["outputs"] == [oracle_greedy(base[1], p, LENGTH) for p in asked]
    assert max(n for accepted in got["tokens_per_step"] for n in accepted) > 1, "no draft token was accepted"


SCALINGS = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_theta"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_rope_scalings_in_both_spellings(tmp_path, ranks, kind, spelling):
    scaling = {"rope_type": kind, "rope_theta": 5000.0} | SCALINGS[kind]
    model = make_model(tmp_path, family_config("llama", rope_parameters=scaling))
    if spelling == "rope_theta":  # as older configs are written
        config = json.loads((tmp_path / "config.json").read_text())
        del config["rope_parameters"]
        old = {k: v for k, v in scaling.items() if k != "rope_theta"}
        (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0, "rope_scaling": old}))
    prompt = prompts(8)[7]
    wanted = [(prompt, SamplingParams(max_tokens=LENGTH, ignore_eos=True))]
    got = ranks(1).run(answer, EngineConfig(model=str(tmp_path), dtype="float32", max_num_seqs=1), wanted)[0]
    assert got["outputs"] == [oracle_greedy(model, prompt, LENGTH)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tied_embeddings_biases_and_many_ranks(tmp_path, ranks, family):
    """One KV head among four ranks, biases everywhere, a vocabulary smaller than a rank's candidates."""
    changes = {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1, "vocab_size": 211}
    if family == "llama":
        changes["mlp_bias"] = True
    model = make_model(tmp_path, family_config(family, **changes))
    heads = save_heads(tmp_path / "heads", head_tensors(model))
    asked = prompts(4, vocab=211)
    config = EngineConfig(model=str(tmp_path), medusa=str(heads), dtype="float32", max_num_seqs=4)
    wanted = [(p, SamplingParams(max_tokens=LENGTH, ignore_eos=True)) for p in asked]
    assert ranks(4).run(answer, config, wanted)[0]["outputs"] == [oracle_greedy(model, p, LENGTH) for p in asked]


def test_bfloat16_with_and_without_speculation(base, ranks):
    """In bfloat16 rows may differ by a rounding with their number, so only most tokens have to agree."""
    outputs = []
    for tree in ("off", ""):
        config = EngineConfig(
            model=str(base[0]), medusa=str(base[0] / "heads"), tree=tree, dtype="bfloat16", max_num_seqs=4
        )
        wanted = [(p, SamplingParams(max_tokens=LENGTH, ignore_eos=True)) for p in prompts(4)]
        outputs.append(ranks(1).run(answer, config, wanted)[0]["outputs"])
    firsts = [(a[0], b[0]) for a, b in zip(*outputs, strict=True)]
    assert all(a == b for a, b in firsts), "the first token comes from the same rows"
    assert sum(a == b for a, b in zip(*outputs, strict=True)) >= 2


def test_generation_config(copy):
    config = load_model_config(str(copy), "float32")
    assert generation_config.end_ids(str(copy), config) == {2}
    path = copy / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [5, 9], "do_sample": True, "temperature": 0.6, "top_k": 20}))
    assert generation_config.end_ids(str(copy), config) == {5, 9}
    assert generation_config.default_params(str(copy)) == {"temperature": 0.6, "top_k": 20}
    path.write_text(json.dumps({"do_sample": True, "repetition_penalty": 1.05}))
    assert generation_config.default_params(str(copy)) == {"temperature": 1.0, "repetition_penalty": 1.05}
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert generation_config.default_params(str(copy)) == {}
    path.write_text("{")
    refused("generation_config.json is damaged", copy)


def test_a_tokenizer_s_text_is_what_the_model_wrote(tmp_path):
    vocabulary("metaspace").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clean_up_tokenization_spaces": True}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("a . b", add_special_tokens=False)) == "a . b"
