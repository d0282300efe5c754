"""Reads safetensors: every rank reads only its slices, and a checkpoint must not contain unknown tensors."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from euryale.client.rules import MAP, Rule, is_text
from euryale.parallel.sharding import WHOLE, Shard
from euryale.scheduler import json_file


def _is_weight_map(value: object) -> bool:
    if not isinstance(value, dict) or not MAP.fits(value):
        return False
    return all(is_text(f) and f.endswith(".safetensors") and not set(f) & set("/\\\0") for f in value.values())


_WEIGHT_MAP = Rule("a map from tensors to .safetensors files beside it", _is_weight_map)
_NUM_PIECES, _PIECE_BYTES = 64, 1 << 14  # of each file, for the fingerprint


class Checkpoint:
    """The tensors of a model in Hugging Face format, in one file or in several with an index.

    Its methods raise ValueError, naming the file, for anything missing, damaged or of the wrong shape. ``used``: names
    of the tensors that were read.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.used: set[str] = set()
        self._handles: dict[str, Any] = {}
        self._file_of = self._index()

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def files(self) -> list[Path]:
        """Paths of the files that hold tensors, sorted."""
        return [self.directory / name for name in sorted(set(self._file_of.values()))]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor ``name``."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, shape: tuple[int, ...], shard: Shard, dtype: torch.dtype) -> torch.Tensor:
        """Read ``shard`` of the tensor ``name``, in ``dtype``. The whole tensor must have ``shape``."""
        if name not in self._file_of:
            raise ValueError(f"{self.directory} has no tensor {name}: the checkpoint is incomplete or of another kind")
        self.used.add(name)
        part = self._slice(name)
        if tuple(part.get_shape()) != shape:
            raise ValueError(
                f"tensor {name} in {self._file_of[name]} has shape {list(part.get_shape())}, "
                f"but the configuration says {list(shape)}"
            )
        return cut(part, shard).to(dtype)

    def refuse_unused(self, ignored: tuple[str, ...] = ()) -> None:
        """Raise ValueError if a tensor was never read, as the model would then compute other results.

        ``ignored``: endings of names that may stay unread.
        """
        extra = sorted(n for n in self.names - self.used if not n.endswith(ignored))
        if extra:
            raise ValueError(
                f"{self.directory} holds {len(extra)} tensors this model does not know, such as {extra[0]}: "
                "config.json does not describe this checkpoint"
            )

    def _slice(self, name: str) -> Any:
        file = self._file_of[name]
        return self._open(file).get_slice(name)

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            path = self.directory / file
            try:
                self._handles[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is missing or damaged ({error}): copy it again") from error
        return self._handles[file]

    def _index(self) -> dict[str, str]:
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            content = json_file.read_object(index)
            json_file.check(index, content, {"weight_map": _WEIGHT_MAP}, remedy="copy it again")
            if "weight_map" not in content:
                raise ValueError(f"{index} is damaged (weight_map is missing): copy it again")
            file_of = content["weight_map"]
            promised: dict[str, set[str]] = {}
            for name, file in file_of.items():
                promised.setdefault(file, set()).add(name)
            for file, names in sorted(promised.items()):
                if missing := names - set(_keys(self._open(file))):
                    raise ValueError(f"{self.directory / file} lacks {min(missing)}, which the index promises")
            return file_of
        if not (self.directory / "model.safetensors").is_file():
            raise ValueError(f"{self.directory} has neither model.safetensors nor model.safetensors.index.json")
        return dict.fromkeys(_keys(self._open("model.safetensors")), "model.safetensors")


def _keys(handle: Any) -> list[str]:
    return list(handle.keys())


def cut(tensor: Any, shard: Shard) -> torch.Tensor:
    """Return ``shard`` of a tensor or of a safetensors slice, padded with zeros to its length."""
    if shard.dim is None:
        whole: torch.Tensor = tensor[:]
        return whole
    parts: list[torch.Tensor] = [tensor[a:b] if shard.dim == 0 else tensor[:, a:b] for a, b in shard.ranges]
    part = torch.cat(parts, dim=shard.dim) if len(parts) > 1 else parts[0]
    missing = shard.length - part.shape[shard.dim]
    if missing:
        shape = list(part.shape)
        shape[shard.dim] = missing
        part = torch.cat([part, part.new_zeros(shape)], dim=shard.dim)
    return part


def read_heads(directory: str | Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a Medusa heads directory (``medusa_lm_head.safetensors`` or ``.pt``), unsharded.

    Reading a ``.pt`` file executes no code in it. Raises ValueError for a missing or damaged file.
    """
    directory = Path(directory)
    safe, pickled = directory / "medusa_lm_head.safetensors", directory / "medusa_lm_head.pt"
    try:
        if safe.is_file():
            with safe_open(safe, framework="pt") as handle:
                return {name: cut(handle.get_slice(name), WHOLE) for name in _keys(handle)}
        if pickled.is_file():
            tensors = torch.load(pickled, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
                raise ValueError("it does not hold tensors by name")
            return {str(name): tensor for name, tensor in tensors.items()}
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(f"the Medusa heads in {directory} are damaged ({error}): copy them again") from error
    except Exception as error:  # the unpickler's own errors
        raise ValueError(f"{pickled} is not a plain file of tensors ({error})") from error
    raise ValueError(f"{directory} holds neither medusa_lm_head.safetensors nor medusa_lm_head.pt")


def fingerprint(files: list[Path], note: str) -> str:
    """Return 16 hex digits that identify a model as it is run.

    They hash each file's name, size and 64 evenly spaced pieces of 16 KiB, and ``note``, which says how files are used.
    """
    digest = hashlib.sha256(note.encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for piece in range(_NUM_PIECES):
                file.seek(max(0, size - _PIECE_BYTES) * piece // (_NUM_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()[:16]
