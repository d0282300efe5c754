"""Importing this module makes a bare checkout importable, and nothing else: some processes of tests need no torch."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

sys.path.append(str(ROOT / "src"))  # where nothing is installed, this checkout
