"""The residual connection of Medusa heads on a GPU: a few rows once a step, where PyTorch's own kernels do."""

from euryale.kernels.add_silu.reference import add_silu  # noqa: F401
