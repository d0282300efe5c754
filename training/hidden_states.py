"""Hidden states of a frozen backbone, computed once and kept on disk."""

import logging
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from euryale.parallel.group import Group
from euryale.training.loop import Training
from euryale.training.packing import Batch

logger = logging.getLogger("euryale.training")
_ITEM = {"bfloat16": (torch.bfloat16, 2), "float32": (torch.float32, 4)}


class StoredHiddenStates:
    """A file of [windows, length, hidden size]. All ranks read the same file: nodes must share the directory."""

    def __init__(self, training: Training, path: Path, hidden_size: int, group: Group) -> None:
        """Read the file, after writing it if it is not complete. ValueError, on every rank, if there is no room."""
        self._group = group
        dtype, item = _ITEM[training.options.precision]
        shape = (len(training.windows), training.options.length, hidden_size)
        size = int(np.prod(shape)) * item
        complete = path.with_suffix(".complete")
        is_complete = complete.exists() and path.exists() and path.stat().st_size == size
        self._agree(None if is_complete else self._announce(path, size))
        if group.is_leader and not is_complete:
            complete.unlink(missing_ok=True)
            with path.open("wb") as file:
                file.truncate(size)
        self._agree(None)
        self._states = torch.from_file(str(path), shared=True, size=int(np.prod(shape)), dtype=dtype).view(shape)
        if not is_complete:
            self._fill(training)
            self._agree(None)
            if group.is_leader:
                complete.touch()

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Hidden states [B, L, D] of the batch."""
        return self._states[batch.windows.cpu()].to(self._group.device)

    def _announce(self, path: Path, size: int) -> str | None:
        if not self._group.is_leader:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        logger.info("hidden states: %.2f GB in %s (%.2f GB free)", size / 1e9, path, free / 1e9)
        if size < free:
            return None
        return (
            f"the hidden states need {size / 1e9:.1f} GB and {path.parent} has {free / 1e9:.1f} GB free: "
            "leave out --cache-hidden-states, give fewer data, or another --out"
        )

    def _agree(self, error: str | None) -> None:
        try:
            self._group.agree(error)
        except RuntimeError as problem:
            raise ValueError(str(problem)) from None

    def _fill(self, training: Training) -> None:
        """Every rank computes its share; FSDP wants all of them to run the model equally often."""
        step = training.options.batch * self._group.size
        rounded = np.arange(-(-len(training.windows) // step) * step) % len(training.windows)
        mine = rounded[self._group.share(len(rounded))].reshape(-1, training.options.batch)
        for indices in tqdm(mine, desc="hidden states", unit="batch", disable=not self._group.is_leader):
            batch = training.windows.batch(indices).to(self._group.device)
            with training.autocast():
                hidden = training.model(batch, task="look")
            self._states[batch.windows.cpu()] = hidden.to(self._states.dtype).cpu()
