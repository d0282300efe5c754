"""Converts a checkpoint with Medusa heads for vLLM: a backbone without heads, and heads in vLLM's format."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from euryale.parallel.sharding import WHOLE
from euryale.runtime.model.checkpoint import Checkpoint
from euryale.runtime.model.medusa_checkpoint import MERGED_PREFIX, HeadTensors, load_heads

_PLAIN = {"format": "pt"}


def write(model: str, medusa: str, directory: Path) -> tuple[Path, Path | None]:
    """Write backbone and heads below ``directory``; returns their directories, None for heads if there are none."""
    config = json.loads((Path(model) / "config.json").read_text())
    checkpoint = Checkpoint(model)
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")

    def read(name: str) -> torch.Tensor:
        return checkpoint.read(name, checkpoint.shape(name), WHOLE, dtype)

    backbone = directory / "backbone"
    backbone.mkdir(parents=True, exist_ok=True)
    # vLLM rejects tensors that its Llama does not know, and interprets unknown keys.
    (backbone / "config.json").write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("medusa")}))
    names = [name for name in checkpoint.names if not name.startswith(MERGED_PREFIX)]
    save_file({name: read(name) for name in names}, backbone / "model.safetensors", metadata=_PLAIN)
    found = load_heads(medusa, checkpoint, config["hidden_size"], config["vocab_size"])
    if found is None:
        return backbone, None
    lm_head = read("model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight")
    return backbone, write_heads(found, lm_head, dtype, directory / "heads")


def write_heads(heads: HeadTensors, lm_head: torch.Tensor, dtype: torch.dtype, directory: Path) -> Path:
    """Write the heads in vLLM's format and return ``directory``.

    Heads without their own lm_heads use ``lm_head`` [V, D], which vLLM reads from their file and stores once.
    """
    directory.mkdir(exist_ok=True)
    tensors = {}
    for layer, (weights, biases) in enumerate(zip(heads.weights, heads.biases, strict=True)):
        for head, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            tensors[f"blocks.{head}.layers.{layer}.weight"] = weight
            tensors[f"blocks.{head}.layers.{layer}.bias"] = bias
    for head, weight in enumerate(heads.lm_heads or [lm_head]):
        tensors[f"lm_heads.{head}.weight"] = weight
    vocab_size, hidden_size = lm_head.shape
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "num_heads": heads.num_heads,
        "num_hidden_layers": heads.num_layers,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "truncated_vocab_size": vocab_size,
        "original_lm_head": not heads.lm_heads,
        "medusa_fc_bias": True,  # without it vLLM ignores the biases
        "dtype": str(dtype).removeprefix("torch."),
    }
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata=_PLAIN)
    return directory
