"""The backbone's sizes and features, as the model code reads them."""

import dataclasses
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from euryale.runtime.model.config_file import read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and features of a backbone.

    ``max_positions``: the model's maximum length in tokens. ``tied``: the embedding is also the lm_head. ``windows``:
    each layer's sliding window in tokens, None for full attention. ``hf``: the transformers config it was read from.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_positions: int
    tied: bool
    windows: tuple[int | None, ...]
    has_qkv_bias: bool
    has_o_bias: bool
    has_mlp_bias: bool
    dtype: torch.dtype
    hf: PreTrainedConfig = dataclasses.field(repr=False, compare=False)

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.family == "qwen3"


def load_model_config(directory: str, dtype: str) -> ModelConfig:
    """Read ``config.json``. ``dtype``: a key of DTYPES, or auto for the stored one.

    Raises ValueError, naming the field, for a model that this runtime cannot run exactly.
    """
    hf = read_config(directory)
    num_heads = hf.num_attention_heads
    biased = bool(getattr(hf, "attention_bias", False))
    return ModelConfig(
        family=hf.model_type,
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // num_heads,
        vocab_size=hf.vocab_size,
        rms_norm_eps=hf.rms_norm_eps,
        max_positions=hf.max_position_embeddings,
        tied=hf.tie_word_embeddings,
        windows=_windows(hf),
        has_qkv_bias=biased or hf.model_type == "qwen2",
        has_o_bias=biased,
        has_mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        dtype=_dtype(hf, dtype),
        hf=hf,
    )


def _windows(hf: PreTrainedConfig) -> tuple[int | None, ...]:
    window = getattr(hf, "sliding_window", None)
    types = getattr(hf, "layer_types", None)
    if types is None:
        return (window if hf.model_type == "mistral" else None,) * hf.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _dtype(hf: PreTrainedConfig, wanted: str) -> torch.dtype:
    if wanted != "auto":
        return DTYPES[wanted]
    stored: torch.dtype = hf.dtype if isinstance(hf.dtype, torch.dtype) else getattr(torch, str(hf.dtype or "float32"))
    # float16's range is too small for some activations, so float16 weights are used as bfloat16.
    return torch.float32 if stored == torch.float32 else torch.bfloat16
