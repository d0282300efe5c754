"""Collectives by torch.distributed: NCCL among GPUs, gloo among CPU ranks of several hosts."""

import torch
import torch.distributed as dist

from euryale.kernels.add_rms_norm import add_rms_norm


class TorchCollectives:
    """The methods of ``SharedMemoryCollectives`` over torch's default process group, whose timeout bounds each wait.

    Collectives in a CUDA graph are an exception: ``Group.wait_for_device`` bounds these.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._size, self._device = size, device

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum of ``x`` over the ranks, computed in float32."""
        total = x.float() if x.dtype != torch.float32 else x.contiguous()
        dist.all_reduce(total)
        return total.to(x.dtype)

    def all_reduce_add_rms_norm(
        self, partial_sum: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ``kernels.add_rms_norm`` of the sum of the ranks' ``partial_sum`` [T, D]."""
        return add_rms_norm(self.all_reduce(partial_sum), residual, weight, eps)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Returns every rank's ``x`` [...], stacked in rank order: [size, ...]."""
        out = torch.empty((self._size, *x.shape), dtype=x.dtype, device=x.device)
        if self._device.type == "cuda":
            dist.all_gather_into_tensor(out, x.contiguous())
        else:
            dist.all_gather(list(out.unbind(0)), x.contiguous())
        return out

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the leader's CPU tensor ``x`` on the CPU of every rank."""
        on_device = x.to(self._device)
        dist.broadcast(on_device, src=0)
        return on_device.cpu()

    def close(self) -> None:
        """Does nothing: ``Group.close`` destroys the process group."""
