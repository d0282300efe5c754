"""Loads weights by name, sharded as SHARDING of the model says and quantized if the engine's settings ask for it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from euryale.kernels.linear.quantize import QuantizedWeight, Weight, quantize
from euryale.parallel.group import Group
from euryale.parallel.sharding import WHOLE, Layout, Shard, ceil_div
from euryale.runtime.model.checkpoint import Checkpoint, cut


@dataclass(frozen=True)
class Weights:
    """A view of the tensors of a checkpoint whose names begin with ``prefix``.

    ``sharding`` maps endings of matrix names to styles of ``Layout.shards``. ``quantization`` applies to all matrices
    and to no table.
    """

    checkpoint: Checkpoint
    layout: Layout
    sharding: dict[str, str]
    dtype: torch.dtype
    quantization: str = "none"
    prefix: str = ""

    @property
    def group(self) -> Group:
        """The group of ranks."""
        return self.layout.group

    def scope(self, name: str) -> "Weights":
        """Return the view below ``name``."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def vector(self, name: str, length: int) -> torch.Tensor:
        """Load a replicated vector, such as a norm's weight: [length]."""
        return self._read(name, (length,), WHOLE)

    def matrix(
        self, name: str, out_features: int, in_features: int, has_bias: bool = False
    ) -> tuple[Weight, torch.Tensor | None]:
        """Load this rank's shards of a linear layer: weight [out, in] and bias [out], None without ``has_bias``."""
        weight_shard, bias_shard = self._shards(name, out_features, in_features)
        weight_name, shape = f"{name}.weight", (out_features, in_features)
        if self.quantization == "none" or weight_shard.dim != 1:
            weight = self.quantized(self._read(weight_name, shape, weight_shard), self._style(name) == "vocabulary")
        else:  # quantized before its inputs are sharded, so that every group size has the same quantized values
            whole = self.quantized(self._read(weight_name, shape, WHOLE))
            assert isinstance(whole, QuantizedWeight)
            weight = _shard_inputs(whole, weight_shard, self.prefix + name)
        return weight, self._read(f"{name}.bias", (out_features,), bias_shard) if has_bias else None

    def table(self, name: str, rows: int, width: int) -> torch.Tensor:
        """Load this rank's shard of a lookup table: [rows, width], never quantized."""
        return self._read(f"{name}.weight", (rows, width), self._shards(name, rows, width)[0])

    def quantized(self, weight: torch.Tensor, is_lm_head: bool = False) -> Weight:
        """Quantize a weight [out, in] with the format of all matrices.

        An lm_head gets int8 instead of int4, because its errors affect the logits directly.
        """
        return quantize(weight, "int8" if is_lm_head and self.quantization == "int4" else self.quantization)

    def matrices(
        self, sizes: dict[str, int], in_features: int, has_bias: bool = False
    ) -> tuple[list[Weight], list[torch.Tensor | None]]:
        """Load weights and biases of linear layers with the same input. ``sizes``: output features by name."""
        pairs = [self.matrix(name, size, in_features, has_bias) for name, size in sizes.items()]
        return [w for w, _ in pairs], [b for _, b in pairs]

    def progress(self, steps: Iterable[int]) -> Iterable[int]:
        """Show the progress of loading on the leader."""
        is_hidden = None if self.group.is_leader else True  # None: shown on a terminal
        return tqdm(steps, desc="loading", unit="layer", disable=is_hidden, leave=False)

    def _shards(self, name: str, out_features: int, in_features: int) -> tuple[Shard, Shard]:
        return self.layout.shards(self._style(name), out_features, in_features)

    def _style(self, name: str) -> str:
        return next((s for ending, s in self.sharding.items() if (self.prefix + name).endswith(ending)), "whole")

    def _read(self, name: str, shape: tuple[int, ...], shard: Shard) -> torch.Tensor:
        return self.checkpoint.read(self.prefix + name, shape, shard, self.dtype).to(self.group.device)


def _shard_inputs(weight: QuantizedWeight, shard: Shard, name: str) -> QuantizedWeight:
    """Return the part of a quantized weight that multiplies this rank's inputs, which are consecutive."""
    values = cut(weight.values, shard)
    if weight.group == weight.shape[1]:  # one scale per output
        return replace(weight, values=values, group=shard.length)
    group, end, start, stop = weight.group, weight.shape[1], shard.ranges[0][0], shard.ranges[-1][1]
    if start % group or (stop % group and stop != end):
        raise ValueError(
            f"--quantization {weight.kind} stores {name} in groups of {group} inputs, which a rank's shard of "
            f"{shard.length} of {end} inputs would cut: use fewer ranks, or give int8"
        )
    groups = Shard(1, ((start // group, ceil_div(stop, group)),), ceil_div(shard.length, group))
    return replace(weight, values=values, scales=cut(weight.scales, groups), zeros=cut(weight.zeros, groups))
