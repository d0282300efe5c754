"""What a value given by a user must be, and one way to say so: used for parameters, flags and JSON files alike.

A rule completes the sentence "NAME must be ...". No numpy, no torch.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

_SHOWN = 60  # characters of a wrong value in an error message
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _SHOWN
_repr.maxlong = 40


def shown(value: object) -> str:
    """``value`` as Python writes it, on one line and at most 60 characters long; for error messages."""
    try:
        text = " ".join(_repr.repr(value).split())
    except Exception:  # a whole number of too many digits, or a class whose own repr fails
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


@dataclass(frozen=True)
class Rule:
    """``says`` completes "must be ..."; ``fits`` tells whether a value is so, and never raises."""

    says: str
    fits: Callable[[object], bool]

    def check(self, name: str, value: object) -> None:
        """Raises ValueError, naming what was given and what is right, unless ``value`` fits."""
        if not self.fits(value):
            raise ValueError(f"{name} must be {self.says}, not {shown(value)}")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether this is an integer; booleans do not count."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: object) -> TypeGuard[str]:
    """Whether this is a string that can be sent: half a surrogate pair cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole(low: int, high: int, unit: str = "") -> Rule:
    """A whole number within bounds, both included."""
    return Rule(
        f"a whole number{unit and ' of ' + unit} from {low} to {high}", lambda v: is_whole(v) and low <= v <= high
    )


def number(low: float, high: float, unit: str = "", *, above: bool = False) -> Rule:
    """A finite number within bounds, both included; ``low`` is left out with ``above``."""
    bounds = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"

    def fits(value: object) -> bool:
        if not is_whole(value) and not (isinstance(value, float) and math.isfinite(value)):
            return False
        return (low < value if above else low <= value) and value <= high

    return Rule(f"a number{unit and ' of ' + unit} {bounds}", fits)


def text(most: int | None = None, least: int = 0) -> Rule:
    """A string that is valid Unicode, of a bounded number of characters if ``most`` is given."""
    size = "" if most is None else f" of {least} to {most} characters" if least else f" of at most {most} characters"
    high = math.inf if most is None else most
    return Rule(f"a string of Unicode text{size}", lambda v: is_text(v) and least <= len(v) <= high)


def one_of(*choices: object) -> Rule:
    """One of a few values."""
    says = ", ".join(str(choice) for choice in choices[:-1])
    return Rule(
        f"{says} or {choices[-1]}" if says else str(choices[-1]),
        lambda v: any(type(v) is type(choice) and v == choice for choice in choices),
    )


def list_of(item: Rule, most: int, least: int = 0) -> Rule:
    """A list or tuple whose items all follow a rule."""
    size = f"{least} to {most}" if least else f"at most {most}"
    return Rule(
        f"a list of {size} items, each {item.says}",
        lambda v: isinstance(v, list | tuple) and least <= len(v) <= most and all(map(item.fits, v)),
    )


def either(*rules: Rule) -> Rule:
    """Any one of several rules."""
    return Rule(", or ".join(rule.says for rule in rules), lambda v: any(rule.fits(v) for rule in rules))


BOOLEAN = Rule("true or false", lambda v: isinstance(v, bool))
NULL = Rule("null", lambda v: v is None)
MAP = Rule("a map with string keys", lambda v: isinstance(v, Mapping) and all(isinstance(k, str) for k in v))
