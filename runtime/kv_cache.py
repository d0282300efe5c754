"""The KV cache's tensors. Who owns which page is the scheduler's business; this file only stores and commits.

Rows of a step go to a scratch first. Only ``commit`` writes pages, so a step that is never committed leaves
the cache as it was.
"""

import os

import torch

from euryale.kernels.commit import commit
from euryale.kernels.rope_qk import rope_qk
from euryale.kernels.step_metadata import StepMetadata
from euryale.kernels.tree_attention import tree_attention
from euryale.parallel.group import Group
from euryale.parallel.sharding import Layout
from euryale.runtime.config import EngineConfig
from euryale.runtime.model import rope
from euryale.runtime.model.config import ModelConfig

GIB = 1 << 30


class KVCache:
    """``pages`` [layers, 2, pages, kv_heads, page_size, head_dim]; ``scratch`` [layers, 2, rows, kv_heads, head_dim],
    the K/V of the step under way."""

    def __init__(self, config: ModelConfig, layout: Layout, num_pages: int, page_size: int, num_rows: int) -> None:
        """``num_rows``: of the largest step."""
        head, num_kv_heads = (config.num_layers, 2), layout.num_kv_heads
        kind = {"dtype": config.dtype, "device": layout.group.device}
        # Zeros, not empty: attention multiplies unwritten slots by a weight of zero, and 0 * NaN is NaN.
        self.pages = torch.zeros(*head, num_pages, num_kv_heads, page_size, config.head_dim, **kind)
        self.scratch = torch.zeros(*head, num_rows, num_kv_heads, config.head_dim, **kind)
        self.page_size, self.num_pages, self.num_rows = page_size, num_pages, num_rows
        self.group_size = layout.num_query_heads // num_kv_heads  # query heads of a kv head
        self._layers = list(zip(self.scratch.unbind(), self.pages.unbind(), strict=True))
        self._scale = config.head_dim**-0.5
        self._windows = config.windows

    def attend(self, layer: int, qkv: torch.Tensor, rotary, norms, metadata: StepMetadata) -> torch.Tensor:
        """Attention of the rows' ``qkv`` [R, (heads + 2 kv_heads) * head_dim], which is consumed: [R, heads *
        head_dim]. Their keys and values stay in the scratch. ``rotary``: cosines and sines by position; ``norms``:
        weights of the q/k norm, or None twice, and its epsilon."""
        scratch, pages = self._layers[layer]
        q = rope_qk(qkv, metadata.positions, *rotary, scratch, *norms)
        return tree_attention(q, scratch, pages, metadata, self._scale, self._windows[layer])

    def commit(self, slots: torch.Tensor) -> None:
        """Make the rows of the last step that have a slot, int64 [R], permanent, in all layers at once."""
        commit(self.pages, self.scratch, slots)


def longest_request(engine: EngineConfig, config: ModelConfig, num_kv_heads: int, group: Group) -> int:
    """The most tokens that one request may have: --max-model-len, or without it as many as the model was made for and
    the memory can hold. Raises ValueError for a --max-model-len beyond either. Known before weights are loaded, so on
    GPUs an upper bound: ``count_pages`` knows what is left beside them."""
    most, wanted = min(config.max_positions, rope.MOST_POSITIONS), engine.max_model_len
    if wanted > most:
        raise ValueError(f"--max-model-len {wanted} is more than the {most} tokens the model was made for: lower it")
    memory = _allowed_memory(engine, group)
    held = int(memory // _page_bytes(engine, config, num_kv_heads)) * engine.page_size
    if wanted:
        _check_held(wanted, held)
        return wanted
    return max(1, min(most, held))


def count_pages(engine: EngineConfig, config: ModelConfig, num_kv_heads: int, max_len: int, group: Group) -> int:
    """Pages that fit the memory allowed, the smallest number over the ranks; ValueError if that is none, or too few for
    one request of --max-model-len."""
    page = _page_bytes(engine, config, num_kv_heads)
    useful = engine.max_num_seqs * -(-max_len // engine.page_size)
    allowed = _allowed_memory(engine, group)
    if group.device.type == "cuda" and not engine.kv_cache_memory:
        free, total = torch.cuda.mem_get_info(group.device)
        allowed = free - (1 - engine.gpu_memory_utilization) * total
    pages = group.minimum(min(useful, int(allowed // page)))
    if pages < 1:
        raise ValueError(f"{allowed / GIB:.2g} GiB hold no KV page of {page} bytes: give --kv-cache-memory more")
    if engine.max_model_len:
        _check_held(engine.max_model_len, pages * engine.page_size)
    return pages


def _page_bytes(engine: EngineConfig, config: ModelConfig, num_kv_heads: int) -> int:
    return 2 * config.num_layers * num_kv_heads * engine.page_size * config.head_dim * config.dtype.itemsize


def _allowed_memory(engine: EngineConfig, group: Group) -> float:
    """Bytes that the KV cache of this rank may have, weights not counted. ValueError if there are not so many."""
    is_gpu = group.device.type == "cuda"
    total = (
        torch.cuda.mem_get_info(group.device)[1] if is_gpu else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    if engine.kv_cache_memory * GIB > total:
        raise ValueError(
            f"--kv-cache-memory {engine.kv_cache_memory:g} is more than the {total / GIB:.4g} GiB of memory there are: "
            "lower it"
        )
    if engine.kv_cache_memory:
        return engine.kv_cache_memory * GIB
    return engine.gpu_memory_utilization * total if is_gpu else 1 * GIB


def _check_held(max_model_len: int, held: int) -> None:
    if max_model_len > held:
        raise ValueError(
            f"--max-model-len {max_model_len} is more than the {held} tokens that the KV cache holds: lower it, or "
            "raise --kv-cache-memory"
        )
