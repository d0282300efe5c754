"""Makes a bare checkout importable when imported. Imports nothing else, as some test processes must not need torch."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

sys.path.append(str(ROOT / "src"))  # for a checkout that is not installed
