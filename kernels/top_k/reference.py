"""The largest values in plain PyTorch: a stable sort, because topk does not define the order of equal values."""

import torch

from euryale.kernels.top_k import pack, values_and_ids


def top_k(x: torch.Tensor, k: int, num_valid: int, offset: int) -> torch.Tensor:
    """See the package's public function."""
    return _largest(x[:, :num_valid].float(), None, k, offset)


def merge_top_k(parts: torch.Tensor) -> torch.Tensor:
    """See the package's public function."""
    values, ids = zip(*(values_and_ids(part) for part in parts), strict=True)
    return _largest(torch.cat(values, dim=1), torch.cat(ids, dim=1), parts.shape[-1], 0)


def _largest(x: torch.Tensor, ids: torch.Tensor | None, k: int, offset: int) -> torch.Tensor:
    """The ``k`` largest of ``x`` and their ``ids``, or their columns plus ``offset``."""
    missing = max(0, k - x.shape[1])
    if k == 1 and not missing:
        values = x.max(dim=1, keepdim=True).values
        places = (x == values).int().argmax(dim=1, keepdim=True)
    else:
        values, places = (found[:, :k] for found in x.sort(dim=1, descending=True, stable=True))
    ids = places + offset if ids is None else ids.gather(1, places)
    if missing:
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        ids = torch.nn.functional.pad(ids, (0, missing))
    return pack(values, ids)
