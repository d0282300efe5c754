"""The KV cache's tensors, and how much memory they get. The scheduler decides which request owns which page.

The rows of a step go to a scratch first. Only ``commit`` writes pages, so a step that is never committed leaves the
cache unchanged.
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

QKNorms = tuple[torch.Tensor | None, torch.Tensor | None, float]  # weights of q and k norm (None: no norm), epsilon


class KVCache:
    """This rank's keys and values, in the model's dtype.

    ``pages`` [layers, 2, pages, kv_heads, page_size, head_dim] holds committed K/V. ``scratch`` [layers, 2, rows,
    kv_heads, head_dim] holds the K/V of the current step.
    """

    def __init__(self, config: ModelConfig, layout: Layout, num_pages: int, page_size: int, num_rows: int) -> None:
        """``num_rows``: rows of the largest step."""
        head, num_kv_heads = (config.num_layers, 2), layout.num_kv_heads
        dtype, device = config.dtype, layout.group.device
        # Zeros, not empty: attention multiplies unwritten slots by a weight of zero, and 0 * NaN is NaN.
        self.pages = torch.zeros(*head, num_pages, num_kv_heads, page_size, config.head_dim, dtype=dtype, device=device)
        self.scratch = torch.zeros(*head, num_rows, num_kv_heads, config.head_dim, dtype=dtype, device=device)
        self.page_size, self.num_pages, self.num_rows = page_size, num_pages, num_rows
        self.group_size = layout.num_query_heads // num_kv_heads  # query heads per kv head
        self._layers = list(zip(self.scratch.unbind(), self.pages.unbind(), strict=True))
        self._scale = config.head_dim**-0.5
        self._windows = config.windows

    def attend(
        self, layer: int, qkv: torch.Tensor, rotary: rope.Rotary, norms: QKNorms, metadata: StepMetadata
    ) -> torch.Tensor:
        """Compute one layer's attention: [R, heads * head_dim], in the dtype of ``qkv``.

        Consumes ``qkv`` [R, (heads + 2 kv_heads) * head_dim] and leaves its keys and values in the scratch.
        ``rotary``: cosines and sines by position.
        """
        scratch, pages = self._layers[layer]
        (cos, sin), (q_norm, k_norm, eps) = rotary, norms
        q = rope_qk(qkv, metadata.positions, cos, sin, scratch, q_norm, k_norm, eps)
        return tree_attention(q, scratch, pages, metadata, self._scale, self._windows[layer])

    def commit(self, slots: torch.Tensor) -> None:
        """Copy rows of the last step to pages in all layers. ``slots`` int64 [R]: each row's slot, -1 to drop it."""
        commit(self.pages, self.scratch, slots)


def longest_request(engine: EngineConfig, config: ModelConfig, num_kv_heads: int, group: Group) -> int:
    """Maximum number of tokens of one request.

    That is --max-model-len if given, else the model's maximum as far as the memory can hold it. Raises ValueError for
    a --max-model-len beyond either. Called before weights are loaded, so on GPUs the result is an upper bound:
    ``count_pages`` sees what memory the weights leave.
    """
    most, wanted = min(config.max_positions, rope.MAX_POSITIONS), engine.max_model_len
    if wanted > most:
        raise ValueError(f"--max-model-len {wanted} is more than the {most} tokens the model was made for: lower it")
    memory = _allowed_memory(engine, group)
    held = int(memory // _page_bytes(engine, config, num_kv_heads)) * engine.page_size
    if wanted:
        _check_held(wanted, held)
        return wanted
    return max(1, min(most, held))


def count_pages(engine: EngineConfig, config: ModelConfig, num_kv_heads: int, max_len: int, group: Group) -> int:
    """Number of pages of the KV cache: those that fit the allowed memory, minimised over the ranks.

    Raises ValueError if none fits, or too few for one request of --max-model-len.
    """
    page = _page_bytes(engine, config, num_kv_heads)
    useful = engine.max_num_seqs * -(-max_len // engine.page_size)
    allowed = _allowed_memory(engine, group)
    if group.device.type == "cuda" and not engine.kv_cache_memory:
        free, total = torch.cuda.mem_get_info(group.device)
        allowed = free - (1 - engine.gpu_memory_utilization) * total
    pages = group.minimum(min(useful, int(allowed // page)))
    if pages < 1:
        raise ValueError(f"{allowed / GIB:.2g} GiB hold no KV page of {page} bytes: raise --kv-cache-memory")
    if engine.max_model_len:
        _check_held(engine.max_model_len, pages * engine.page_size)
    return pages


def _page_bytes(engine: EngineConfig, config: ModelConfig, num_kv_heads: int) -> int:
    return 2 * config.num_layers * num_kv_heads * engine.page_size * config.head_dim * config.dtype.itemsize


def _allowed_memory(engine: EngineConfig, group: Group) -> float:
    """Bytes that this rank's KV cache may use, before weights are subtracted.

    Raises ValueError if --kv-cache-memory exceeds the machine's memory.
    """
    is_gpu = group.device.type == "cuda"
    total = (
        torch.cuda.mem_get_info(group.device)[1] if is_gpu else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    if engine.kv_cache_memory * GIB > total:
        raise ValueError(
            f"--kv-cache-memory {engine.kv_cache_memory:g} is more than the {total / GIB:.4g} GiB of memory this "
            "machine has: lower it"
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
