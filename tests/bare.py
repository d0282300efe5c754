"""Importing this module makes a bare checkout importable, and nothing else: some processes of tests need no torch."""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

try:
    import euryale.client  # noqa: F401
except ModuleNotFoundError:
    sys.modules["euryale"] = types.ModuleType("euryale")
    sys.modules["euryale"].__path__ = [str(ROOT)]
