"""Reads the published formats of Medusa heads into one data structure.

Format A is ``medusa_lm_head.*`` with an lm_head for each head. Format B is the same without: the heads use the
backbone's lm_head. Format C is merged into the backbone's checkpoint under ``medusa_head.``. The numbers of heads and
layers follow from the tensors, because published configs are wrong about them.
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
    """Unsharded heads. ``weights[l][h]`` [D, D] and ``biases[l][h]`` [D] belong to residual block l of head h.

    ``lm_heads[h]`` [vocabulary, D]; empty if the heads use the backbone's lm_head.
    """

    weights: list[list[torch.Tensor]]
    biases: list[list[torch.Tensor]]
    lm_heads: list[torch.Tensor]
    num_heads: int

    @property
    def num_layers(self) -> int:
        """Residual blocks of each head."""
        return len(self.weights)


def load_heads(directory: str, backbone: Checkpoint, hidden_size: int, vocab_size: int) -> HeadTensors | None:
    """Load the heads in ``directory``, or those merged into the backbone's checkpoint if it is empty.

    Returns None if there are none. Raises ValueError for heads that do not fit the backbone.
    """
    merged = {n for n in backbone.names if n.startswith(MERGED_PREFIX)}
    if directory:
        backbone.used |= merged  # heads in a directory replace merged ones
        tensors, source = checkpoint.read_heads(directory), str(directory)
    elif merged:
        dtype = torch.float32
        tensors = {n.removeprefix(MERGED_PREFIX): backbone.read(n, backbone.shape(n), WHOLE, dtype) for n in merged}
        source = f"{backbone.directory} ({MERGED_PREFIX}*)"
    else:
        return None
    return parse(tensors, source, hidden_size, vocab_size)


def parse(tensors: dict[str, torch.Tensor], source: str, hidden_size: int, vocab_size: int) -> HeadTensors:
    """Assign tensors to heads by their names.

    Raises ValueError, naming ``source``, for tensors that are missing, unknown or of a wrong shape.
    """
    blocks: dict[tuple[int, int, str], torch.Tensor] = {}
    lm_heads: dict[int, tuple[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _BLOCK.fullmatch(name):
            head, layer, kind = int(match[1]), int(match[2]), match[3]
            blocks[head, layer, kind] = tensor
            wanted: tuple[int, ...] = (hidden_size, hidden_size) if kind == "weight" else (hidden_size,)
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
    """Path of the tree stored with the heads; None if there is none."""
    path = Path(directory or model) / "tree.json"
    return path if path.is_file() else None
