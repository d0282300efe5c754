"""Runs a module of the package from a bare checkout: ``run_module.py euryale.benchmarks.kernels.step ...``."""

import runpy
import sys

import bare  # noqa: F401

sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
