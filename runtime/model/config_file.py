"""Reads ``config.json`` of a backbone. Every field that the runtime uses is checked before transformers reads it.

Fields that change no result, such as dropout rates, are ignored and not passed on.
"""

from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig

from euryale.client.rules import BOOLEAN, MAP, NULL, Rule, either, list_of, number, one_of, shown, whole
from euryale.scheduler import json_file

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")
REMEDY = "correct it, or copy the file again"

_TOKENS = whole(1, 2**31 - 1, "tokens")
_DTYPE = either(NULL, one_of("float32", "float16", "bfloat16"))
_THETA = number(1, 1e15, above=True)
_TOKEN_ID = whole(0, 2**31 - 1)
# Upper bounds of sizes are about a hundred times those of the largest models.
RULES: dict[str, Rule] = {
    "vocab_size": whole(1, 2**31 - 1),
    "hidden_size": whole(1, 2**22),
    "intermediate_size": whole(1, 2**24),
    "num_hidden_layers": whole(1, 2**14),
    "num_attention_heads": whole(1, 2**14),
    "num_key_value_heads": either(NULL, whole(1, 2**14)),
    "head_dim": either(NULL, whole(2, 2**12)),
    "max_position_embeddings": _TOKENS,
    "rms_norm_eps": number(0, 1, above=True),
    "tie_word_embeddings": BOOLEAN,
    "attention_bias": BOOLEAN,
    "mlp_bias": BOOLEAN,
    "sliding_window": either(NULL, _TOKENS),
    "use_sliding_window": BOOLEAN,
    "max_window_layers": whole(0, 2**31 - 1),
    "layer_types": either(NULL, list_of(one_of("full_attention", "sliding_attention"), 2**14)),
    "rope_theta": _THETA,
    "rope_scaling": either(NULL, MAP),
    "rope_parameters": either(NULL, MAP),
    "partial_rotary_factor": either(NULL, one_of(1, 1.0)),
    "original_max_position_embeddings": _TOKENS,
    "eos_token_id": either(NULL, _TOKEN_ID, list_of(_TOKEN_ID, 1024)),
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
}
_FACTOR = number(0, 1e6, above=True)
ROPE_RULES: dict[str, Rule] = {
    "rope_type": one_of(*ROPE_TYPES),
    "type": one_of(*ROPE_TYPES),
    "rope_theta": _THETA,
    "partial_rotary_factor": one_of(1, 1.0),
    "factor": number(1, 1e6),
    "low_freq_factor": _FACTOR,
    "high_freq_factor": _FACTOR,
    "original_max_position_embeddings": _TOKENS,
    "attention_factor": either(NULL, _FACTOR),
    "beta_fast": either(NULL, _FACTOR),
    "beta_slow": either(NULL, _FACTOR),
    "mscale": either(NULL, _FACTOR),
    "mscale_all_dim": either(NULL, _FACTOR),
    "truncate": BOOLEAN,
    "finetuned": BOOLEAN,  # only documents the model's origin
}
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def read_config(directory: str) -> PreTrainedConfig:
    """Read the transformers configuration of the model in ``directory``.

    Raises ValueError, naming file and field, for a value that no supported model has.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} holds no config.json: give the directory of a model in Hugging Face format")
    content = json_file.read_object(path)
    _check_support(path, content)
    json_file.check(path, content, RULES, remedy=REMEDY)
    for name in ("rope_scaling", "rope_parameters"):
        if content.get(name):
            _check_rope(path, name, content[name])
    _check_together(path, content)
    kept = {name: content[name] for name in RULES if name in content}
    for name in ("rms_norm_eps", "rope_theta"):
        if name in kept:
            kept[name] = float(kept[name])
    try:
        config = CONFIG_MAPPING[content["model_type"]].from_dict(kept)
    except Exception as error:  # the library raises many types
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    _check_shape(path, config)
    return config


def _check_support(path: Path, content: dict) -> None:
    model_type, act = content.get("model_type"), content.get("hidden_act", "silu")
    if model_type not in SUPPORTED:
        raise ValueError(
            f"{path}: model_type {shown(model_type)} is not supported: it must be one of {', '.join(SUPPORTED)}"
        )
    if act != "silu":
        raise ValueError(f"{path}: hidden_act {shown(act)} is not supported: it must be 'silu'")
    if content.get("quantization_config"):
        raise ValueError(
            f"{path}: quantization_config is not supported: give a checkpoint of float32, float16 or bfloat16 weights"
        )


def _check_rope(path: Path, name: str, content: dict) -> None:
    """Check the scaling of rotary positions: its type and the numbers that this type needs."""
    if unknown := sorted(set(content) - set(ROPE_RULES)):
        raise ValueError(
            f"{path}: {name}.{shown(unknown[0])[1:-1]} is not supported: this model's positions are unknown"
        )
    json_file.check(path, content, ROPE_RULES, remedy=REMEDY, within=name)
    kind = content.get("rope_type", content.get("type", "default"))
    for needed in _ROPE_NEEDS[kind]:
        if needed not in content:
            raise ValueError(f"{path}: {name}.{needed} is missing, which rope_type {kind} needs: {REMEDY}")
    if kind == "llama3":
        low, high = content["low_freq_factor"], content["high_freq_factor"]
        if low >= high:
            raise ValueError(
                f"{path}: {name}.high_freq_factor must be above low_freq_factor {low}, not {high}: {REMEDY}"
            )
    slow, fast = content.get("beta_slow") or 1, content.get("beta_fast") or 32
    if kind == "yarn" and slow >= fast:
        raise ValueError(f"{path}: {name}.beta_fast must be above beta_slow {slow}, not {fast}: {REMEDY}")


def _check_together(path: Path, content: dict) -> None:
    """Check combinations of fields that transformers refuses without naming the file."""
    hidden, heads = content.get("hidden_size"), content.get("num_attention_heads")
    needs_whole = content.get("head_dim") is None or content["model_type"] == "llama"
    if hidden and heads and needs_whole and hidden % heads:
        raise ValueError(
            f"{path}: hidden_size must be a multiple of num_attention_heads {heads}, not {hidden}: {REMEDY}"
        )
    types, layers = content.get("layer_types"), content.get("num_hidden_layers")
    if types is not None and layers and len(types) != layers:
        raise ValueError(
            f"{path}: layer_types must name {layers} layers (num_hidden_layers), not {len(types)}: {REMEDY}"
        )


def _check_shape(path: Path, config: PreTrainedConfig) -> None:
    """Check combinations of fields once the model family's defaults are filled in."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ValueError(
            f"{path}: num_attention_heads must be a multiple of num_key_value_heads {kv_heads}, not {heads}: {REMEDY}"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if not head_dim or head_dim % 2:
        raise ValueError(
            f"{path}: head_dim (or hidden_size / num_attention_heads) must be even, not {head_dim}: {REMEDY}"
        )
    ids = config.eos_token_id
    for token in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        if token >= config.vocab_size:
            raise ValueError(
                f"{path}: eos_token_id must be below vocab_size {config.vocab_size}, not {token}: {REMEDY}"
            )
