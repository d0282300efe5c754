"""Engines with random weights and the shapes of real models, for measuring steps.

Nothing is written to disk: RandomCheckpoint generates every requested tensor.
"""

from typing import Any

import torch
from transformers import LlamaConfig

from euryale.parallel.group import Group
from euryale.parallel.sharding import Layout, Shard
from euryale.runtime.config import EngineConfig
from euryale.runtime.engine import Engine
from euryale.runtime.kv_cache import KVCache
from euryale.runtime.model.checkpoint import Checkpoint
from euryale.runtime.model.config import ModelConfig
from euryale.runtime.model.decoder import SHARDING, Decoder
from euryale.runtime.model.medusa_checkpoint import HeadTensors
from euryale.runtime.model.medusa_heads import MedusaHeads
from euryale.runtime.model.weights import Weights
from euryale.runtime.startup import Loaded, make_graphs
from euryale.runtime.step import StepRunner
from euryale.scheduler.limits import SchedulerLimits
from euryale.scheduler.speculation.tree import TreeConfig, TreeShape

PAGE, ROWS = 16, 512  # tokens of a page, rows of a step
# hidden, layers, heads, kv heads, intermediate, vocabulary
SHAPES = {
    "demo-6m": (256, 6, 8, 4, 768, 4096),
    "llama-110m": (768, 12, 12, 12, 2048, 32000),
    "llama-1b": (2048, 16, 32, 8, 8192, 128256),
    "llama-7b": (4096, 32, 32, 32, 11008, 32000),
    "llama-8b-gqa": (4096, 32, 32, 8, 14336, 128256),
}


class RandomCheckpoint(Checkpoint):
    """Generates tensors of the requested shapes: norms are ones, matrices are normal with deviation 0.02."""

    def __init__(self, device: torch.device) -> None:
        """``device``: that of the generated tensors."""
        self.device = device

    def read(self, name: str, shape: tuple[int, ...], shard: Shard, dtype: torch.dtype) -> torch.Tensor:
        """Return this rank's shard of a tensor."""
        sizes = list(shape)
        if shard.dim is not None:
            sizes[shard.dim] = shard.length
        if len(sizes) == 1:
            return torch.ones(sizes, dtype=dtype, device=self.device)
        return torch.empty(sizes, dtype=dtype, device=self.device).normal_(0, 0.02)


def model_config(name: str, dtype: torch.dtype, max_positions: int) -> ModelConfig:
    """Return the configuration of a named shape."""
    hidden, layers, heads, kv_heads, width, vocab = SHAPES[name]
    return ModelConfig(
        family="llama",
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        rms_norm_eps=1e-5,
        max_positions=max_positions,
        tied=name == "demo-6m",
        windows=(None,) * layers,
        has_qkv_bias=False,
        has_o_bias=False,
        has_mlp_bias=False,
        dtype=dtype,
        hf=LlamaConfig(hidden_size=hidden, num_attention_heads=heads),
    )


def make_runner(
    name: str,
    dtype: torch.dtype,
    context: int,
    group: Group,
    eager: bool,
    num_candidates: int = 8,
    quantization: str = "none",
    num_seqs: int = 1,
) -> StepRunner:
    """Return a step runner with four Medusa heads that use the backbone's lm_head.

    The KV cache has pages for ``num_seqs`` requests of ``context`` tokens and a tree each, and holds random keys and
    values.
    """
    config = model_config(name, dtype, context + 256)
    layout = Layout(group, config.num_heads, config.num_kv_heads, config.head_dim)
    weights = Weights(RandomCheckpoint(group.device), layout, SHARDING, dtype, quantization)
    decoder = Decoder(config, weights, max(context + 256, ROWS))
    hidden, num_heads = config.hidden_size, 4
    block = [torch.zeros(hidden, hidden) for _ in range(num_heads)], [torch.zeros(hidden) for _ in range(num_heads)]
    tensors = HeadTensors(weights=[block[0]], biases=[block[1]], lm_heads=[], num_heads=num_heads)
    heads = MedusaHeads(tensors, weights, decoder.lm_head, decoder.shard)
    pages = num_seqs * (-(-(context + 128) // PAGE) + 1)
    cache = KVCache(config, layout, pages, PAGE, ROWS)
    cache.pages.normal_()
    graphs = None if eager else make_graphs(cache, config, ROWS, group)
    return StepRunner(decoder, heads, cache, num_candidates, graphs)


def make_engine(
    name: str, dtype: torch.dtype, tree: TreeShape | None, max_len: int, group: Group, num_seqs: int = 1, **options: Any
) -> Engine:
    """Return an engine for ``num_seqs`` concurrent requests of up to ``max_len`` tokens; ``options`` are those of
    EngineConfig."""
    runner = make_runner(name, dtype, max_len, group, False, tree.num_candidates if tree else 0, num_seqs=num_seqs)
    runner.heads = runner.heads if tree else None
    limits = SchedulerLimits(
        max_model_len=max_len,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=ROWS,
        vocab_size=runner.decoder.shard.vocab_size,
        num_pages=runner.cache.num_pages,
        page_size=PAGE,
    )
    model = model_config(name, dtype, max_len)
    loaded = Loaded(
        runner=runner,
        limits=limits,
        trees=TreeConfig(shape=tree) if tree else None,
        text=None,
        acceptance_stats=None,
        model=model,
        fingerprint="random weights",
    )
    return Engine(EngineConfig(model=name, **options), group, loaded)
