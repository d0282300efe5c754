"""Hidden states of a frozen backbone, computed once and kept on disk."""

import hashlib
import logging
import math
import os
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
        """Read the file, after writing it if it is not complete, of other windows or of another model. ValueError, on
        every rank, if there is no room."""
        self._group = group
        dtype, item = _ITEM[training.options.precision]
        shape = (len(training.windows), training.options.length, hidden_size)
        size, mark = math.prod(shape) * item, path.with_suffix(".complete")
        digest = hashlib.sha256(training.windows.tokens)
        digest.update(training.windows.documents)
        content = f"{digest.hexdigest()} {training.options.quantize} {training.options.model}"
        is_complete = mark.exists() and path.exists() and mark.read_text() == content and path.stat().st_size == size
        with group.agreed():  # all have looked before the leader changes anything
            pass
        with group.agreed():
            if group.is_leader and not is_complete:
                mark.unlink(missing_ok=True)
                self._make_room(path, size)
        self._states = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        if not is_complete:
            self._fill(training)
            with group.agreed():
                if group.is_leader:
                    mark.write_text(content)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Hidden states [B, L, D] of the batch."""
        return self._states[batch.windows.cpu()].to(self._group.device)

    def _make_room(self, path: Path, size: int) -> None:
        """Take all the room at once: a disk that fills up under a mapped file would kill the process."""
        path.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        logger.info("hidden states: %.2f GB in %s (%.2f GB free)", size / 1e9, path, free / 1e9)
        try:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise ValueError(
                f"the hidden states need {size / 1e9:.2f} GB and {path.parent} has {free / 1e9:.2f} GB free ({error}): "
                "leave out --cache-hidden-states, give fewer data, or another --out"
            ) from error

    def _fill(self, training: Training) -> None:
        """Every rank computes its share; FSDP wants all of them to run the model equally often."""
        step = training.options.batch * self._group.size
        rounded = np.arange(-(-len(training.windows) // step) * step) % len(training.windows)
        mine = rounded[self._group.own_items(len(rounded))].reshape(-1, training.options.batch)
        for indices in tqdm(mine, desc="hidden states", unit="batch", disable=not self._group.is_leader):
            batch = training.windows.batch(indices).to(self._group.device)
            with training.autocast():
                hidden = training.model(batch, task="look")
            self._states[batch.windows.cpu()] = hidden.to(self._states.dtype).cpu()
