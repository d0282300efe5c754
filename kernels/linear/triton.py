"""The matrix product on a GPU is PyTorch's own, which is cuBLAS."""

from euryale.kernels.linear.reference import empty, linear, pack  # noqa: F401
