"""Benchmarks of kernels, collectives and whole steps."""
