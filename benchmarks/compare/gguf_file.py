"""Converts a Hugging Face Llama checkpoint to a GGUF file for llama.cpp: ``gguf_file.py MODEL DTYPE OUT.gguf``.

Runs as a script in the peer's environment, which has the ``gguf`` package, and does not import Euryale. The file has no
vocabulary: tokens go in and come out as ids.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
IGNORED = re.compile(r"medusa_head\..*|.*\.rotary_emb\.inv_freq")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def metadata(config: dict) -> dict:
    """Return the GGUF metadata for a ``config.json``. ValueError for unsupported models."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config["model_type"] != "llama" or rope.get("rope_type", "default") != "default":
        raise ValueError("only Llama models with plain rotary positions are converted for llama.cpp")
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "none",
    }


def read_safetensors(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor of the directory as float32; safetensors' numpy interface does not support bfloat16."""
    for path in sorted(directory.glob("model*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            data = np.frombuffer(file.read(), dtype=np.uint8)
        header.pop("__metadata__", None)
        for name, info in header.items():
            raw = data[slice(*info["data_offsets"])]
            if info["dtype"] == "BF16":
                values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                values = raw.view({"F16": "<f2", "F32": "<f4"}[info["dtype"]]).astype(np.float32)
            yield name, values.reshape(info["shape"])


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection [heads * head_dim, D] for llama.cpp.

    llama.cpp rotates the pair (2i, 2i + 1) of a head, Hugging Face (i, i + head_dim / 2).
    """
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def tensors(directory: Path, config: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the GGUF name and the float32 values of every tensor. ValueError for a tensor without GGUF counterpart."""
    keys = metadata(config)
    heads = {
        "self_attn.q_proj": keys["llama.attention.head_count"],
        "self_attn.k_proj": keys["llama.attention.head_count_kv"],
    }
    for name, values in read_safetensors(directory):
        if IGNORED.fullmatch(name) or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        match = _LAYER.fullmatch(name)
        prefix, rest = (f"blk.{match[1]}.", match[2]) if match else ("", name)
        module, _, kind = rest.rpartition(".")
        if module not in NAMES or kind != "weight":
            raise ValueError(f"tensor {name} has no counterpart in the GGUF file of a Llama model")
        yield f"{prefix}{NAMES[module]}.weight", interleaved(values, heads[module]) if module in heads else values


def write(directory: Path, dtype: str, out: Path) -> None:
    """Write the GGUF file with matrices in ``dtype`` (float32 or bfloat16) and norms in float32."""
    import gguf

    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    for key, value in metadata(config).items():
        kind = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        kind(key, value)
    half = gguf.GGMLQuantizationType.BF16
    for name, values in tensors(directory, config):
        if dtype == "bfloat16" and values.ndim > 1:
            writer.add_tensor(name, gguf.quantize(values, half), raw_dtype=half)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
