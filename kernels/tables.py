"""Arrays that the host computes for every step, in one block of memory that one copy moves to the device."""

import numpy as np
import torch

_ALIGNMENT = 16  # bytes
_DTYPES = {
    np.dtype("int64"): torch.int64,
    np.dtype("int32"): torch.int32,
    np.dtype("int8"): torch.int8,
    np.dtype("float32"): torch.float32,
}


class Tables:
    """Named arrays on the host and, as ``tensors``, on ``device``; on a CPU both are the same memory."""

    def __init__(self, arrays: dict[str, np.ndarray], device: torch.device, room: dict[str, int] | None = None) -> None:
        """Hold ``arrays`` of int64, int32, int8 or float32. ``room``: the most entries that an array of varying length
        may have in a later ``fill``; its tensor is one-dimensional."""
        self._views: dict[str, np.ndarray] = {}
        offset, places = 0, {}
        for name, array in arrays.items():
            count = max((room or {}).get(name, 0), array.size)
            places[name] = (offset, count if room and name in room else None)
            offset += -(-count * array.itemsize // _ALIGNMENT) * _ALIGNMENT
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(max(offset, 1), dtype=torch.uint8, pin_memory=on_gpu)
        self._block = torch.zeros_like(self._host, device=device) if on_gpu else self._host
        self.tensors: dict[str, torch.Tensor] = {}
        for name, (start, capacity) in places.items():
            shape = arrays[name].shape if capacity is None else (capacity,)
            size = int(np.prod(shape)) * arrays[name].itemsize
            raw = self._host.numpy()[start : start + size]
            self._views[name] = raw.view(arrays[name].dtype).reshape(shape)
            block = self._block[start : start + size]
            self.tensors[name] = block.view(_DTYPES[arrays[name].dtype]).view(shape)
        self._filled: dict[str, np.ndarray] = {}
        self.fill(arrays)

    def fill(self, arrays: dict[str, np.ndarray]) -> None:
        """Replace the contents. Shapes must be the same, except for arrays with ``room``.

        The device must no longer need the earlier contents, and the last copy must have ended. An array that is the
        same object as in the last call is not copied again, so callers must not modify it.
        """
        for name, array in arrays.items():
            if self._filled.get(name) is not array:
                view = self._views[name]
                (view if view.shape == array.shape else view[: len(array)])[...] = array
        self._filled = arrays
        if self._block is not self._host:
            self._block.copy_(self._host, non_blocking=True)
