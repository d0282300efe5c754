"""Replaces any field of the files beside a model by any JSON value.

The file either loads to something usable, or one line names file and field. No other error occurs.
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import family_config
from tokenizers import Tokenizer, models, pre_tokenizers

from euryale.frontend.tokenizer import load_tokenizer
from euryale.runtime.model import generation_config, rope
from euryale.runtime.model.config import load_model_config
from euryale.runtime.model.config_file import ROPE_RULES, RULES
from euryale.scheduler import json_file
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.speculation.acceptance_stats import AcceptanceStats
from euryale.scheduler.speculation.tree import load_tree
from euryale.scheduler.step_cost import Profile

NASTY = (0, -1, 1, 2, 3, 10**8, 10**18, 2**31, 2**64, 10**400, 1e-400, 0.5, 1e300, float("nan"), float("inf"), -0.0)
WORDS = ("", "silu", "llama3", "yarn", "dynamic", "float32", "bfloat16", "float64", "full_attention", "\ud800", "a\nb")
scalars = st.none() | st.booleans() | st.sampled_from(NASTY) | st.integers() | st.floats() | st.sampled_from(WORDS)
values = st.recursive(
    scalars | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(("factor", "type", "x")), inner),
    max_leaves=6,
)
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {"default": {"rope_type": "default", "rope_theta": 1e4}, "yarn": YARN, "llama3": LLAMA3}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def write(path, content) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def config_of(family: str, scaling: str) -> dict:
    return json.loads(family_config(family, rope_parameters=dict(ROPES[scaling])).to_json_string(use_diff=False))


def use(directory) -> None:
    """Read config.json as an engine does before it reads weights."""
    config = load_model_config(str(directory), "auto")
    rope.check(config, 64)
    for table in rope.tables(config, 64, torch.device("cpu")):
        assert table.shape == (64, config.head_dim // 2)
        assert torch.isfinite(table).all()
    assert len(config.windows) == config.num_layers
    assert 0 < config.rms_norm_eps <= 1
    assert config.num_heads % config.num_kv_heads == 0
    assert all(0 <= token < config.vocab_size for token in generation_config.end_ids(str(directory), config))


def one_line(error: ValueError, file: str, field: str) -> None:
    text = str(error)
    assert file in text
    assert field in text
    assert "\n" not in text
    assert len(text) < 700


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "one": 5, "two": 6}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(FAMILIES), st.sampled_from(sorted({*RULES, "model_type", "hidden_act", "use_cache"})), values)
def test_any_field_of_config_json(directory, family, field, value):
    write(directory / "config.json", config_of(family, "default") | {field: value})
    try:
        use(directory)
    except ValueError as error:
        one_line(error, "config.json", field)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(sorted(ROPES)),
    st.sampled_from(sorted({*ROPE_RULES, "x"})),
    values,
    st.sampled_from(("rope_parameters", "rope_scaling")),
)
def test_any_field_of_the_rope_parameters(directory, scaling, field, value, place):
    content = config_of("llama", scaling)
    content.pop("rope_parameters")
    write(directory / "config.json", content | {place: ROPES[scaling] | {field: value}})
    try:
        use(directory)
    except ValueError as error:
        one_line(error, "config.json", field)


GENERATION = {"eos_token_id": 2, "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1}
GENERATION |= {"repetition_penalty": 1.1}


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(GENERATION)), values)
def test_any_field_of_generation_config_json(directory, field, value):
    write(directory / "config.json", config_of("llama", "default"))
    write(directory / "generation_config.json", GENERATION | {field: value})
    config = load_model_config(str(directory), "auto")
    try:
        assert all(0 <= token < config.vocab_size for token in generation_config.end_ids(str(directory), config))
        SamplingParams(**generation_config.default_params(str(directory)))
    except ValueError as error:
        one_line(error, "generation_config.json", field)


TOKENIZER = {"model_max_length": 100, "eos_token": "</s>", "chat_template": "{{ messages }}"}
LISTED = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "tokenizer_class", "x")
MORE = ("add_bos_token", "add_eos_token", "bos_token", "clean_up_tokenization_spaces", "pad_token", "backend", *LISTED)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted((*TOKENIZER, *MORE))), values)
def test_any_field_of_tokenizer_config_json(tokenizer_directory, field, value):
    write(tokenizer_directory / "tokenizer_config.json", TOKENIZER | {field: value})
    try:
        tokenizer = load_tokenizer(str(tokenizer_directory), 3001)
        assert tokenizer.decode(tokenizer.encode("one two")) == "one two"
        assert tokenizer.chat_template is None or isinstance(tokenizer.chat_template, str | dict)
    except ValueError as error:
        one_line(error, "tokenizer_config.json", field)


LEARNED = AcceptanceStats(3).to_json()


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(sorted(LEARNED)), values)
def test_any_field_of_what_calibration_learned(field, value):
    try:
        made = AcceptanceStats.from_json(LEARNED | {field: value}, 3)
    except ValueError as error:
        one_line(error, "acceptance_stats", field)
    else:
        assert all(map(torch.isfinite, torch.from_numpy(made.ratios).flatten()))


PROFILE = Profile([1, 4], [1.0, 1.2], [0, 8], [[1.1, 1.6], [1.4, 2.2]]).to_json()


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(PROFILE)), values)
def test_any_field_of_a_kept_profile(field, value):
    try:
        Profile.from_json(PROFILE | {field: value})
    except ValueError as error:
        one_line(error, "profile", "")


@settings(deadline=None, max_examples=200)
@given(values)
def test_any_value_as_a_tree(directory, value):
    write(directory / "tree.json", value)
    try:
        assert load_tree(directory / "tree.json", 3).num_draft_tokens > 0
    except ValueError as error:
        one_line(error, "tree.json", "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 1000 + "]" * 1000, "nested deeper than 32 levels"),
        ('{"a":' * 100_000, "nested deeper than 32 levels"),
        ('"' + "\\" * 1_000_000, "Unterminated string"),
        ("1" * 5000, "damaged"),
        ("", "damaged"),
        ("\ufeff{}", "damaged"),
        (" " * (json_file.MAX_BYTES + 1), "more than 32 MiB"),
    ],
    ids=lambda text: text[:12],
)
def test_files_that_are_no_json(tmp_path, text, reason):
    path = tmp_path / "any.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"any.json is damaged .*{reason}|any.json is {reason}"):
        json_file.read(path)


def test_brackets_in_strings_are_no_nesting(tmp_path):
    content = {"text": "[" * 1000 + '\\"' + "{" * 1000, "list": [[["]]"]]]}
    write(tmp_path / "any.json", content)
    assert json_file.read_object(tmp_path / "any.json") == content
