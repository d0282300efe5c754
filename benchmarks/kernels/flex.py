"""PyTorch's FlexAttention, compiled for one shape, with the same work as our tree attention.

It reads contiguous keys, so that a call gathers the pages first, as with SDPA. PyTorch's own paged helper needs another
cache layout, with heads before pages. The tree is a ``mask_mod``; its block mask is built once per step, outside the
call.
"""

import time
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from euryale.kernels.step_metadata import WORD, SegmentShape, tree_tables


def compiled(
    segment: SegmentShape, q: torch.Tensor, scratch: torch.Tensor, caches: list[torch.Tensor], scale: float
) -> tuple[Callable[[int], torch.Tensor] | None, str]:
    """Return a function of a cache's index and the compilation time; or None and the reason of a failure.

    ``segment`` has one known token. q [rows, heads, dim], scratch [2, rows, kv_heads, dim], a cache [2, pages,
    kv_heads, page_size, dim].
    """
    page = caches[0].shape[3]
    used = -(-segment.context // page)
    pages = torch.from_numpy(segment.pages[:used].astype("int64")).to(q.device)
    bits = torch.from_numpy(tree_tables(segment.parents.tobytes())[1].astype("int64")).to(q.device)
    nodes, keys = torch.arange(len(q), device=q.device), used * page + len(q)
    tree = (bits[:, nodes // WORD] >> nodes % WORD & 1).bool()

    def is_seen(_batch: torch.Tensor, _head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        node = key - used * page
        return (key < segment.context) | ((node >= 0) & tree[row, node.clamp(min=0)])

    def run(copy: int) -> torch.Tensor:
        # Gathered outside the compiled function, which on a CPU confuses a view's sizes with those of its base.
        seen = caches[copy][:, pages].transpose(1, 2).flatten(2, 3)  # [2, kv_heads, keys, dim]
        k, v = torch.cat([seen, scratch.transpose(1, 2)], dim=2)
        queries = q.transpose(0, 1)[None]
        out = flex(queries, k[None], v[None], block_mask=mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)

    started = time.perf_counter()
    try:
        torch.compiler.reset()  # earlier shapes count towards the recompilation limit
        mask = create_block_mask(is_seen, None, None, len(q), keys, device=q.device)
        flex = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        run(0)
    except Exception as error:  # the compiler raises many kinds of errors
        return None, f"not available: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    seconds = time.perf_counter() - started
    return run, f"compiled in {seconds:.0f} s"
