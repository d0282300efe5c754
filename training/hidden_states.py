"""Hidden states of a frozen backbone, computed once and stored on disk."""

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
    """Hidden states [windows, length, hidden size] in a file that all ranks map; all nodes must share its directory."""

    def __init__(self, training: Training, path: Path, hidden_size: int, group: Group) -> None:
        """Map the file ``path``.

        The file is computed first unless it is complete and made from the same windows and model. ValueError on every
        rank if the disk has too little space.
        """
        self._group = group
        dtype, item = _ITEM[training.options.precision]
        shape = (len(training.windows), training.options.length, hidden_size)
        size, marker = math.prod(shape) * item, path.with_suffix(".complete")
        digest = hashlib.sha256(training.windows.tokens.data)
        digest.update(training.windows.documents.data)
        quantization = getattr(training.options, "quantization", "none")
        content = f"{digest.hexdigest()} {quantization} {training.options.model}"
        is_complete = (
            marker.exists() and path.exists() and marker.read_text() == content and path.stat().st_size == size
        )
        with group.agreed():  # every rank has checked the file before the leader changes it
            pass
        with group.agreed():
            if group.is_leader and not is_complete:
                marker.unlink(missing_ok=True)
                self._allocate(path, size)
        self._states = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        if not is_complete:
            self._fill(training)
            with group.agreed():
                if group.is_leader:
                    marker.write_text(content)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return the hidden states [B, L, D] of the batch on the group's device."""
        return self._states[batch.windows.cpu()].to(self._group.device)

    def _allocate(self, path: Path, size: int) -> None:
        """Allocate the whole file at once: a full disk under a mapped file would kill the process."""
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
                "leave out --cache-hidden-states, give less data, or another --out"
            ) from error

    def _fill(self, training: Training) -> None:
        """Compute this rank's windows; FSDP requires the same number of model runs on every rank."""
        step = training.options.batch * self._group.size
        padded = np.arange(-(-len(training.windows) // step) * step) % len(training.windows)
        mine = padded[self._group.own_items(len(padded))].reshape(-1, training.options.batch)
        for indices in tqdm(mine, desc="hidden states", unit="batch", disable=not self._group.is_leader):
            batch = training.windows.batch(indices).to(self._group.device)
            with training.autocast():
                hidden = training.model(batch, task="hidden states")
            self._states[batch.windows.cpu()] = hidden.to(self._states.dtype).cpu()
