"""The KV cache's tensors. Who owns which page is the scheduler's business; this file only stores and commits.

Rows of a step go to a scratch first. Only ``commit`` writes pages, so a step that is never committed leaves
the cache as it was.
"""

import torch

from euryale.kernels.commit import commit
from euryale.kernels.rope_qk import rope_qk
from euryale.kernels.step_metadata import StepMetadata
from euryale.kernels.tree_attention import tree_attention
from euryale.parallel.group import Group
from euryale.parallel.sharding import Layout
from euryale.runtime.config import EngineConfig, ModelConfig

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


def count_pages(engine: EngineConfig, config: ModelConfig, num_kv_heads: int, max_len: int, group: Group) -> int:
    """Pages that fit the memory allowed, the smallest number over the ranks; ValueError if that is none."""
    page = 2 * config.num_layers * num_kv_heads * engine.page_size * config.head_dim * config.dtype.itemsize
    useful = engine.max_num_seqs * -(-max_len // engine.page_size)
    if engine.kv_cache_memory:
        allowed = engine.kv_cache_memory * GIB
    elif group.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(group.device)
        allowed = free - (1 - engine.gpu_memory_utilization) * total
    else:
        allowed = 1 * GIB
    pages = group.minimum(min(useful, int(allowed // page)))
    if pages < 1:
        raise ValueError(f"{allowed / GIB:.2g} GiB hold no KV page of {page} bytes: give --kv-cache-memory more")
    return pages
