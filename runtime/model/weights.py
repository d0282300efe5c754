"""Weights by name: what a layer asks for, cut to this rank's share as the sharding plan says, quantized if asked."""

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
    """A view of a checkpoint below ``prefix``. ``sharding`` maps the end of a matrix's name to a layout style;
    ``quantization`` is that of all matrices, tables left out."""

    checkpoint: Checkpoint
    layout: Layout
    sharding: dict[str, str]
    dtype: torch.dtype
    quantization: str = "none"
    prefix: str = ""

    @property
    def group(self) -> Group:
        return self.layout.group

    def scope(self, name: str) -> "Weights":
        return replace(self, prefix=f"{self.prefix}{name}.")

    def vector(self, name: str, length: int) -> torch.Tensor:
        """A norm's weight, whole: [length]."""
        return self._read(name, (length,), WHOLE)

    def matrix(
        self, name: str, out_features: int, in_features: int, has_bias: bool = False
    ) -> tuple[Weight, torch.Tensor | None]:
        """This rank's weight [out, in] of a linear layer and its bias, None unless the model has one there."""
        weight_shard, bias_shard = self._shards(name, out_features, in_features)
        read = lambda shard: self._read(f"{name}.weight", (out_features, in_features), shard)  # noqa: E731
        if self.quantization == "none" or weight_shard.dim != 1:
            weight = self.quantized(read(weight_shard), self._style(name) == "vocabulary")
        else:  # quantized before its inputs are shared out, so that it stands for the same numbers in every group
            weight = _share_inputs(self.quantized(read(WHOLE)), weight_shard, self.prefix + name)
        return weight, self._read(f"{name}.bias", (out_features,), bias_shard) if has_bias else None

    def table(self, name: str, rows: int, width: int) -> torch.Tensor:
        """This rank's part of what is looked up instead of multiplied: [rows, width], never quantized."""
        return self._read(f"{name}.weight", (rows, width), self._shards(name, rows, width)[0])

    def quantized(self, weight: torch.Tensor, is_lm_head: bool = False) -> Weight:
        """Any other weight [out, in] of the model, stored as all are. An lm_head's errors go straight to the logits: it
        gets 8 bits where the others have 4."""
        return quantize(weight, "int8" if is_lm_head and self.quantization == "int4" else self.quantization)

    def matrices(self, sizes: dict[str, int], in_features: int, has_bias: bool = False) -> tuple[list, list]:
        """Weights and biases of several linear layers with the same input, by name and output features."""
        pairs = [self.matrix(name, size, in_features, has_bias) for name, size in sizes.items()]
        return [w for w, _ in pairs], [b for _, b in pairs]

    def progress(self, steps: Iterable[int]) -> Iterable[int]:
        """Show on one rank how far loading is."""
        is_hidden = None if self.group.is_leader else True  # None: shown on a terminal
        return tqdm(steps, desc="loading", unit="layer", disable=is_hidden, leave=False)

    def _shards(self, name: str, out_features: int, in_features: int) -> tuple[Shard, Shard]:
        return self.layout.shards(self._style(name), out_features, in_features)

    def _style(self, name: str) -> str:
        return next((s for ending, s in self.sharding.items() if (self.prefix + name).endswith(ending)), "whole")

    def _read(self, name: str, shape: tuple[int, ...], shard) -> torch.Tensor:
        return self.checkpoint.read(self.prefix + name, shape, shard, self.dtype).to(self.group.device)


def _share_inputs(weight: QuantizedWeight, shard: Shard, name: str) -> QuantizedWeight:
    """The part of a quantized weight that multiplies this rank's inputs, which lie side by side."""
    values = cut(weight.values, shard)
    if weight.group == weight.shape[1]:  # scales are those of whole outputs
        return replace(weight, values=values, group=shard.length)
    group, end, start, stop = weight.group, weight.shape[1], shard.ranges[0][0], shard.ranges[-1][1]
    if start % group or (stop % group and stop != end):
        raise ValueError(
            f"--quantization {weight.kind} stores {name} in groups of {group} inputs, which a rank's share of "
            f"{shard.length} of {end} inputs would cut: use fewer ranks, or give int8"
        )
    groups = Shard(1, ((start // group, ceil_div(stop, group)),), ceil_div(shard.length, group))
    return replace(weight, values=values, scales=cut(weight.scales, groups), zeros=cut(weight.zeros, groups))
