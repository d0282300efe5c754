"""Published formats of Medusa heads, read into one shape.

A (``medusa_lm_head.*`` with own lm_heads), B (the same without: the backbone's lm_head is shared) and C (merged
into the backbone's checkpoint under ``medusa_head.``). How many heads and layers there are is what the tensors
say, never what a config says: published configs are wrong about it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from euryale.parallel.sharding import WHOLE
from euryale.runtime.model import checkpoint
from euryale.runtime.model.checkpoint import Checkpoint

MERGED_PREFIX = "medusa_head."
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_LM_HEAD = re.compile(r"(\d+)\.(\d+)\.weight")


@dataclass(frozen=True, kw_only=True)
class HeadTensors:
    """Unsharded heads. ``weights[l][h]`` [D, D] and ``biases[l][h]`` [D] of residual block l of head h;
    ``lm_heads[h]`` [vocabulary, D], empty if the backbone's lm_head is shared."""

    weights: list[list[torch.Tensor]]
    biases: list[list[torch.Tensor]]
    lm_heads: list[torch.Tensor]
    num_heads: int

    @property
    def num_layers(self) -> int:
        return len(self.weights)


def load_heads(directory: str, backbone: Checkpoint, hidden_size: int, vocab_size: int) -> HeadTensors | None:
    """The heads in ``directory``, or those merged into the backbone's checkpoint if it is empty; None if there
    are none. ValueError for anything that does not fit the backbone."""
    merged = {n for n in backbone.names if n.startswith(MERGED_PREFIX)}
    if directory:
        backbone.used |= merged  # heads given by hand replace merged ones
        tensors, source = checkpoint.read_heads(directory), str(directory)
    elif merged:
        dtype = torch.float32
        tensors = {n.removeprefix(MERGED_PREFIX): backbone.read(n, backbone.shape(n), WHOLE, dtype) for n in merged}
        source = f"{backbone.directory} ({MERGED_PREFIX}*)"
    else:
        return None
    return parse(tensors, source, hidden_size, vocab_size)


def parse(tensors: dict[str, torch.Tensor], source: str, hidden_size: int, vocab_size: int) -> HeadTensors:
    """Sort tensors by name into heads; ValueError, naming ``source``, for missing, unknown or misshapen ones."""
    blocks: dict[tuple[int, int, str], torch.Tensor] = {}
    lm_heads: dict[int, tuple[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _BLOCK.fullmatch(name):
            head, layer, kind = int(match[1]), int(match[2]), match[3]
            blocks[head, layer, kind] = tensor
            wanted = (hidden_size, hidden_size) if kind == "weight" else (hidden_size,)
        elif match := _LM_HEAD.fullmatch(name):
            lm_heads[int(match[1])] = (int(match[2]), tensor)
            wanted = (vocab_size, hidden_size)
        else:
            raise ValueError(f"{source}: tensor {name} is not part of Medusa heads in a known format")
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"{source}: tensor {name} has shape {list(tensor.shape)} but the backbone needs {list(wanted)}: "
                "these heads were trained for another model"
            )
    heads = {h for h, _, _ in blocks} | set(lm_heads)
    if not heads or heads != set(range(len(heads))):
        raise ValueError(f"{source}: heads are numbered {sorted(heads)}, not 0 to n - 1: some are missing")
    num_layers = max((layer + 1 for _, layer, _ in blocks), default=0)
    wanted_blocks = {(h, layer, kind) for h in heads for layer in range(num_layers) for kind in ("weight", "bias")}
    if missing := sorted(wanted_blocks - set(blocks)):
        head, layer, kind = missing[0]
        raise ValueError(f"{source}: tensor {head}.{layer}.linear.{kind} is missing")
    if lm_heads and (set(lm_heads) != heads or {layer for layer, _ in lm_heads.values()} != {num_layers}):
        raise ValueError(f"{source}: only some heads have an lm_head {{h}}.{num_layers}.weight: some are missing")
    order = sorted(heads)
    return HeadTensors(
        weights=[[blocks[h, layer, "weight"] for h in order] for layer in range(num_layers)],
        biases=[[blocks[h, layer, "bias"] for h in order] for layer in range(num_layers)],
        lm_heads=[lm_heads[h][1] for h in order] if lm_heads else [],
        num_heads=len(order),
    )


def tree_beside(directory: str, model: str) -> Path | None:
    """The tree that was stored with the heads, if any."""
    path = Path(directory or model) / "tree.json"
    return path if path.is_file() else None
