"""What kernels, collectives and whole steps cost."""
