"""Collectives through torch.distributed: NCCL among GPUs, gloo among CPU ranks of several hosts."""

import torch
import torch.distributed as dist

from euryale.kernels.add_rms_norm import add_rms_norm


class ProcessGroup:
    """The same methods as ``SharedMemory`` over torch's default process group, whose timeout bounds each but for those
    in a CUDA graph, which ``Group.wait_for_device`` watches over."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size, self._device = size, device

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of ``x`` over the ranks, taken in float32."""
        total = x.float() if x.dtype != torch.float32 else x.contiguous()
        dist.all_reduce(total)
        return total.to(x.dtype)

    def all_reduce_add_rms_norm(
        self, share: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``kernels.add_rms_norm`` of the sum of the ranks' ``share`` [T, D]."""
        return add_rms_norm(self.all_reduce(share), residual, weight, eps)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x`` [...], stacked in rank order: [size, ...]."""
        out = torch.empty((self._size, *x.shape), dtype=x.dtype, device=x.device)
        if self._device.type == "cuda":
            dist.all_gather_into_tensor(out, x.contiguous())
        else:
            dist.all_gather(list(out.unbind(0)), x.contiguous())
        return out

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """The leader's CPU tensor ``x``, on the CPU of every rank."""
        on_device = x.to(self._device)
        dist.broadcast(on_device, src=0)
        return on_device.cpu()

    def close(self) -> None:
        """Nothing to do: the process group is the ``Group``'s, which needs it to the end."""
