"""Lets the tests run from a bare checkout."""

import sys
import types
from pathlib import Path

try:
    import euryale.client  # noqa: F401
except ModuleNotFoundError:
    sys.modules["euryale"] = types.ModuleType("euryale")
    sys.modules["euryale"].__path__ = [str(Path(__file__).resolve().parents[1])]
