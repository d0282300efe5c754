"""JSON files that users bring: size and depth are bounded before parsing, and fields are checked before use.

Every error is a ValueError of one line that names the file, the field, what stands there and what is right.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from euryale.client.rules import Rule, shown

MAX_BYTES = 32 << 20  # the index of a checkpoint with 100,000 tensors has 9 MB
MAX_DEPTH = 32
# Possessive, so that an unfinished string takes linear time.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


def parse(text: str) -> object:
    """The value that ``text`` describes. Raises ValueError if it is not JSON, or nested too deeply to be read."""
    raw = np.frombuffer(_STRING.sub(b"", text.encode(errors="replace")), dtype=np.uint8)
    opens, closes = (raw == ord("[")) | (raw == ord("{")), (raw == ord("]")) | (raw == ord("}"))
    depths = np.cumsum(opens.astype(np.int32) - closes.astype(np.int32))
    if len(depths) and depths.max() > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    return json.loads(text)


def read(path: str | Path, remedy: str = "copy it again") -> object:
    """The value in a file. Raises ValueError, with the ``remedy``, if it cannot be read, is too large or not JSON."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
        return parse(raw.decode())
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error


def read_object(path: str | Path, remedy: str = "copy it again") -> dict:
    """The JSON object in a file; ValueError as ``read``, and for any other value."""
    content = read(path, remedy)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it must hold a JSON object, not {shown(content)}): {remedy}")
    return content


def check(path: str | Path, content: Mapping, rules: Mapping[str, Rule], *, remedy: str, within: str = "") -> None:
    """Raise ValueError for the first field of ``content`` that is there and breaks its rule. ``within``: the name of
    the object it belongs to, if not the whole file."""
    for name, rule in rules.items():
        if name in content and not rule.fits(content[name]):
            field = f"{within}.{name}" if within else name
            raise ValueError(f"{path}: {field} must be {rule.says}, not {shown(content[name])}: {remedy}")
