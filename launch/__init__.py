"""Thin entry points, run by torchrun or python."""
