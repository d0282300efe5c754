"""Numbers that the host makes for every step: one block of memory, so that one copy takes them to the device."""

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
    """Arrays by name, and as ``tensors`` on ``device``; on a CPU both are the same memory."""

    def __init__(self, arrays: dict[str, np.ndarray], device: torch.device, room: dict[str, int] | None = None) -> None:
        """Holds ``arrays``. ``room``: how many entries arrays of varying length may have when they are filled again."""
        self._views, self._rest, offset = {}, {}, 0
        places = {}
        for name, array in arrays.items():
            count = max((room or {}).get(name, 0), array.size)
            places[name] = (offset, count if room and name in room else None)
            offset += -(-count * array.itemsize // _ALIGNMENT) * _ALIGNMENT
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(max(offset, 1), dtype=torch.uint8, pin_memory=on_gpu)
        self._block = torch.zeros_like(self._host, device=device) if on_gpu else self._host
        self.tensors = {}
        for name, (start, count) in places.items():
            shape = arrays[name].shape if count is None else (count,)
            size = int(np.prod(shape)) * arrays[name].itemsize
            raw = self._host.numpy()[start : start + size]
            self._views[name] = raw.view(arrays[name].dtype).reshape(shape)
            block = self._block[start : start + size]
            self.tensors[name] = block.view(_DTYPES[arrays[name].dtype]).view(shape)
        self._filled: dict[str, np.ndarray] = {}
        self.fill(arrays)

    def fill(self, arrays: dict[str, np.ndarray]) -> None:
        """Other contents, of the same shapes except where there is room. The device's earlier contents must have been
        used up, and the last copy to it have ended. An array that is the very object of last time is there already:
        nobody may write to it."""
        for name, array in arrays.items():
            if self._filled.get(name) is not array:
                view = self._views[name]
                (view if view.shape == array.shape else view[: len(array)])[...] = array
        self._filled = arrays
        if self._block is not self._host:
            self._block.copy_(self._host, non_blocking=True)
