"""One sub-package per operation. Callers use its public functions and never branch on hardware."""
