"""The decoder: Llama, Mistral, Qwen2 and Qwen3 in one description that reads like a single-GPU model.

SHARDING is the only place that says how weights are sharded. Legend: R rows of a step, D hidden, V local vocabulary.
"""

import torch

from euryale.kernels.silu_mul import silu_mul
from euryale.kernels.step_metadata import StepMetadata
from euryale.parallel.linear import (
    ColumnParallelLinear,
    ResidualNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime.kv_cache import KVCache
from euryale.runtime.model import rope
from euryale.runtime.model.config import ModelConfig
from euryale.runtime.model.rope import Rotary
from euryale.runtime.model.weights import Weights

# How each matrix of a checkpoint is sharded, by the ending of its name. The styles are those of parallel/sharding.py.
# All other tensors are replicated.
SHARDING = {
    "model.embed_tokens": "vocabulary",
    "lm_head": "vocabulary",
    "self_attn.q_proj": "query_heads",
    "self_attn.k_proj": "kv_heads",
    "self_attn.v_proj": "kv_heads",
    "self_attn.o_proj": "query_heads_in",
    "mlp.gate_proj": "column",
    "mlp.up_proj": "column",
    "mlp.down_proj": "row",
}


class Attention:
    """Self-attention of one layer over this rank's query heads."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = ColumnParallelLinear(*weights.matrices(sizes, config.hidden_size, config.has_qkv_bias))
        o_proj = weights.matrix("o_proj", config.hidden_size, q_size, config.has_o_bias)
        self.o_proj = RowParallelLinear(weights.group, *o_proj)
        self.layer, self.eps = layer, config.rms_norm_eps
        has_norm = config.has_qk_norm
        self.q_norm = weights.vector("q_norm.weight", config.head_dim) if has_norm else None
        self.k_norm = weights.vector("k_norm.weight", config.head_dim) if has_norm else None

    def __call__(self, x_RD: torch.Tensor, rotary: Rotary, cache: KVCache, metadata: StepMetadata) -> torch.Tensor:
        """Return this rank's partial sum of the layer's output: [R, D]."""
        qkv = self.qkv_proj(x_RD)
        return self.o_proj(cache.attend(self.layer, qkv, rotary, (self.q_norm, self.k_norm, self.eps), metadata))


class MLP:
    """The feed-forward block of one layer, sharded over its intermediate features."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        hidden, width, has_bias = config.hidden_size, config.intermediate_size, config.has_mlp_bias
        sizes = {"gate_proj": width, "up_proj": width}
        self.gate_up_proj = ColumnParallelLinear(*weights.matrices(sizes, hidden, has_bias))
        self.down_proj = RowParallelLinear(weights.group, *weights.matrix("down_proj", hidden, width, has_bias))

    def __call__(self, x_RD: torch.Tensor) -> torch.Tensor:
        """Return this rank's partial sum of the block's output: [R, D]."""
        return self.down_proj(silu_mul(self.gate_up_proj(x_RD)))


class DecoderLayer:
    """One layer. Its input and output ``x_RD`` is this rank's partial sum of the next addend of the residual stream.

    The next norm reduces it over the ranks and adds it.
    """

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        self.input_layernorm = _norm(config, weights, "input_layernorm.weight")
        self.self_attn = Attention(config, weights.scope("self_attn"), layer)
        self.post_attention_layernorm = _norm(config, weights, "post_attention_layernorm.weight")
        self.mlp = MLP(config, weights.scope("mlp"))

    def __call__(
        self,
        x_RD: torch.Tensor,
        residual_RD: torch.Tensor | None,
        rotary: Rotary,
        cache: KVCache,
        metadata: StepMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next partial sum and the residual stream, both [R, D]. ``residual_RD``: None before layer 0."""
        x_RD, residual_RD = self.input_layernorm(x_RD, residual_RD)
        x_RD = self.self_attn(x_RD, rotary, cache, metadata)
        x_RD, residual_RD = self.post_attention_layernorm(x_RD, residual_RD)
        return self.mlp(x_RD), residual_RD


def _norm(config: ModelConfig, weights: Weights, name: str) -> ResidualNorm:
    return ResidualNorm(weights.group, weights.vector(name, config.hidden_size), config.rms_norm_eps)


class Decoder:
    """A backbone with this rank's weights. ``num_positions``: upper bound of the rows' positions."""

    def __init__(self, config: ModelConfig, weights: Weights, num_positions: int) -> None:
        vocab, hidden = config.vocab_size, config.hidden_size
        embedding = weights.table("model.embed_tokens", vocab, hidden)
        self.embed_tokens = VocabParallelEmbedding(weights.group, embedding)
        layers = weights.progress(range(config.num_layers))
        self.layers = [DecoderLayer(config, weights.scope(f"model.layers.{i}"), i) for i in layers]
        self.norm = _norm(config, weights, "model.norm.weight")
        lm_head = (
            weights.quantized(embedding, is_lm_head=True)
            if config.tied
            else weights.matrix("lm_head", vocab, hidden)[0]
        )
        self.lm_head = ColumnParallelLinear([lm_head], [None])
        self.shard = VocabShard(weights.group, vocab, len(lm_head))
        self.rotary = rope.tables(config, num_positions, weights.group.device)

    def transform(self, x_RD: torch.Tensor, cache: KVCache, metadata: StepMetadata) -> torch.Tensor:
        """Compute hidden states after the final norm: [R, D], equal on every rank.

        Consumes ``x_RD``, the rows of a step as ``embed_tokens`` returns them. Writes their K/V to the cache's scratch.
        """
        residual_RD: torch.Tensor | None = None
        for layer in self.layers:
            x_RD, residual_RD = layer(x_RD, residual_RD, self.rotary, cache, metadata)
        hidden_RD, _ = self.norm(x_RD, residual_RD)
        return hidden_RD

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Compute logits [R, V] over this rank's vocabulary shard, padding included, in the model's dtype."""
        return self.lm_head(hidden_RD)
