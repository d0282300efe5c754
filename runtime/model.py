"""The decoder: Llama, Mistral, Qwen2 and Qwen3 in one description that reads like a single-GPU model.

What is shared out among ranks is said once, as data, in SHARDING. Legend: R rows of a step, D hidden, H local
query heads, K local kv heads, d head dimension.
"""

import torch
import torch.nn.functional as F
from torch import nn

from euryale.kernels.geometry import StepGeometry
from euryale.kernels.rope_qk import rope_qk
from euryale.parallel.linear import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, parameter
from euryale.parallel.vocabulary import VocabShard
from euryale.runtime import rope
from euryale.runtime.config import ModelConfig
from euryale.runtime.kv_cache import KVCache
from euryale.runtime.weights import Weights

# How each matrix of a checkpoint is shared out (the styles are parallel.layout's); all others are held whole.
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


class RMSNorm(nn.Module):
    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = parameter(weight), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        super().__init__()
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = ColumnParallelLinear(*weights.matrices(sizes, config.hidden_size, config.has_qkv_bias))
        o_proj = weights.matrix("o_proj", config.hidden_size, q_size, config.has_o_bias)
        self.o_proj = RowParallelLinear(weights.group, *o_proj)
        self.layer, self.head_dim, self.eps = layer, config.head_dim, config.rms_norm_eps
        self.heads, self.kv_heads = weights.layout.num_query_heads, weights.layout.num_kv_heads
        has_norm = config.has_qk_norm
        self.q_norm = parameter(weights.vector("q_norm.weight", config.head_dim)) if has_norm else None
        self.k_norm = parameter(weights.vector("k_norm.weight", config.head_dim)) if has_norm else None

    def forward(self, x_RD, cos, sin, cache: KVCache, geometry: StepGeometry) -> torch.Tensor:
        qkv = self.qkv_proj(x_RD).view(len(x_RD), -1, self.head_dim)
        q_RHd, k_RKd, v_RKd = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q_RHd, k_RKd = rope_qk(q_RHd, k_RKd, cos, sin, self.q_norm, self.k_norm, self.eps)
        out_RHd = cache.attend(self.layer, q_RHd, k_RKd, v_RKd, geometry)
        return self.o_proj(out_RHd.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        hidden, width, has_bias = config.hidden_size, config.intermediate_size, config.has_mlp_bias
        sizes = {"gate_proj": width, "up_proj": width}
        self.gate_up_proj = ColumnParallelLinear(*weights.matrices(sizes, hidden, has_bias))
        self.down_proj = RowParallelLinear(weights.group, *weights.matrix("down_proj", hidden, width, has_bias))

    def forward(self, x_RD: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x_RD).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(weights.vector("input_layernorm.weight", hidden), eps)
        self.self_attn = Attention(config, weights.scope("self_attn"), layer)
        self.post_attention_layernorm = RMSNorm(weights.vector("post_attention_layernorm.weight", hidden), eps)
        self.mlp = MLP(config, weights.scope("mlp"))

    def forward(self, x_RD, cos, sin, cache: KVCache, geometry: StepGeometry) -> torch.Tensor:
        x_RD = x_RD + self.self_attn(self.input_layernorm(x_RD), cos, sin, cache, geometry)
        return x_RD + self.mlp(self.post_attention_layernorm(x_RD))


class Decoder(nn.Module):
    """A backbone with the weights of this rank."""

    def __init__(self, config: ModelConfig, weights: Weights, num_positions: int) -> None:
        super().__init__()
        vocab, hidden = config.vocab_size, config.hidden_size
        embedding, _ = weights.matrix("model.embed_tokens", vocab, hidden)
        self.embed_tokens = VocabParallelEmbedding(weights.group, embedding)
        layers = weights.progress(range(config.num_layers))
        self.layers = nn.ModuleList(DecoderLayer(config, weights.scope(f"model.layers.{i}"), i) for i in layers)
        self.norm = RMSNorm(weights.vector("model.norm.weight", hidden), config.rms_norm_eps)
        lm_head = embedding if config.tied else weights.matrix("lm_head", vocab, hidden)[0]
        self.lm_head = ColumnParallelLinear([lm_head], [None])
        self.shard = VocabShard(weights.group, vocab, len(lm_head))
        self.cos, self.sin = rope.tables(config, num_positions, weights.group.device)

    def forward(self, tokens_R: torch.Tensor, cache: KVCache, geometry: StepGeometry) -> torch.Tensor:
        """Final-norm hidden states [R, D] of all rows of a step, on every rank."""
        cos, sin = self.cos[geometry.positions], self.sin[geometry.positions]
        x_RD = self.embed_tokens(tokens_R)
        for layer in self.layers:
            x_RD = layer(x_RD, cos, sin, cache, geometry)
        return self.norm(x_RD)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Float32 logits over this rank's vocabulary shard: [R, V]."""
        return self.shard.hide_padding(self.lm_head(hidden_RD))
