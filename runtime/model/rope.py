"""Rotary position tables. Frequencies come from transformers, so that every scaling agrees with it to the last bit."""

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from euryale.runtime.model.config import ModelConfig

MAX_POSITIONS = 1 << 24  # float32 represents all whole numbers up to here

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each [positions, head_dim / 2]


def check(config: ModelConfig, max_len: int) -> None:
    """Raise ValueError if this model's rotary tables are not exact up to ``max_len`` tokens."""
    parameters = config.hf.rope_parameters
    original = parameters.get("original_max_position_embeddings") or config.max_positions
    if parameters["rope_type"] == "dynamic" and max_len > original:
        raise ValueError(
            f"dynamic rope scaling makes past positions depend on the length reached: "
            f"give --max-model-len {original} or less"
        )


def tables(config: ModelConfig, num_positions: int, device: torch.device) -> Rotary:
    """Compute cosines and sines of all positions: two tensors [num_positions, head_dim / 2] in the model's dtype."""
    kind = config.hf.rope_parameters["rope_type"]
    if kind in ("default", "dynamic"):  # dynamic scaling changes nothing within the original length
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        inverse, factor = 1.0 / (config.hf.rope_parameters["rope_theta"] ** exponents), 1.0
    else:
        inverse, factor = ROPE_INIT_FUNCTIONS[kind](config.hf, torch.device("cpu"))
    angles = torch.arange(num_positions, dtype=torch.float)[:, None] * inverse[None, :]
    return (angles.cos() * factor).to(device, config.dtype), (angles.sin() * factor).to(device, config.dtype)
