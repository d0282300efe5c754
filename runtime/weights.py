"""Weights by name: what a layer asks for, cut to this rank's share as the sharding plan says."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from euryale.parallel.group import Group
from euryale.parallel.layout import Layout
from euryale.parallel.shard import WHOLE
from euryale.runtime.checkpoint import Checkpoint


@dataclass(frozen=True)
class Weights:
    """A view of a checkpoint below ``prefix``. ``sharding`` maps the end of a matrix's name to a layout style."""

    checkpoint: Checkpoint
    layout: Layout
    sharding: dict[str, str]
    dtype: torch.dtype
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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This rank's weight [out, in] of a linear layer and its bias, None unless the model has one there."""
        style = next((s for ending, s in self.sharding.items() if (self.prefix + name).endswith(ending)), "whole")
        weight_shard, bias_shard = self.layout.shards(style, out_features, in_features)
        weight = self._read(f"{name}.weight", (out_features, in_features), weight_shard)
        return weight, self._read(f"{name}.bias", (out_features,), bias_shard) if has_bias else None

    def matrices(self, sizes: dict[str, int], in_features: int, has_bias: bool = False) -> tuple[list, list]:
        """Weights and biases of several linear layers with the same input, by name and output features."""
        pairs = [self.matrix(name, size, in_features, has_bias) for name, size in sizes.items()]
        return [w for w, _ in pairs], [b for _, b in pairs]

    def progress(self, steps: Iterable[int]) -> Iterable[int]:
        """Show on one rank how far loading is."""
        return tqdm(steps, desc="loading", unit="layer", disable=not self.group.is_leader, leave=False)

    def _read(self, name: str, shape: tuple[int, ...], shard) -> torch.Tensor:
        return self.checkpoint.read(self.prefix + name, shape, shard, self.dtype).to(self.group.device)
