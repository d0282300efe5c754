"""The largest values in plain PyTorch: a stable sort, since topk leaves the order of equals open."""

import torch


def top_k(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's public function."""
    x, missing = x.float(), k - x.shape[1]
    if k == 1:
        values = x.max(dim=1, keepdim=True).values
        return values, (x == values).int().argmax(dim=1, keepdim=True)
    values, ids = x.sort(dim=1, descending=True, stable=True)
    if missing > 0:
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        ids = torch.nn.functional.pad(ids, (0, missing))
    return values[:, :k].contiguous(), ids[:, :k].contiguous()
