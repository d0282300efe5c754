"""Generates command-line flags from configuration dataclasses, which hold each name, default and help text once.

Only the first rank of a host prints help and errors.
"""

import argparse
import dataclasses
import re
import typing
from collections.abc import Callable
from typing import Any, NoReturn

from euryale.client.rules import shown
from euryale.parallel.group import speaks_for_host
from euryale.runtime.worker import refuse
from euryale.scheduler.flag import flag_name

METAVARS = {int: "N", float: "X", str: "TEXT"}


class FlagParser(argparse.ArgumentParser):
    """An argument parser that reports an error on one line."""

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {"allow_abbrev": False, "usage": "%(prog)s FLAGS"}
        super().__init__(**defaults | options)

    def error(self, message: str) -> NoReturn:
        """Print ``message`` on one line and exit."""
        message = re.sub(r"^argument (--[\w-]+): must", r"\1 must", message)
        message = message if len(message) <= 300 else f"{message[:300]}..."
        self.exit(refuse(ValueError(f"{message} (--help lists all flags)")))

    def _print_message(self, message: str, file: Any = None) -> None:
        if speaks_for_host():
            super()._print_message(message, file)


def whole_number(text: str) -> int:
    """Parse a flag's whole number; ArgumentTypeError for other text."""
    return _read(int, text, "a whole number")


def number(text: str) -> float:
    """Parse a flag's number; ArgumentTypeError for other text."""
    return _read(float, text, "a number")


def _read(kind: Callable[[str], Any], text: str, expected: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {expected}, not {shown(text)}") from None


KINDS: dict[type, Callable[[str], Any]] = {int: whole_number, float: number}


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Add one ``--flag-name`` for every field of the dataclass ``config``, grouped by topic.

    Boolean fields also get ``--no-flag-name``.
    """
    groups = {group.title: group for group in parser._action_groups}
    for field in dataclasses.fields(config):
        topic = field.metadata["topic"]
        if topic not in groups:
            groups[topic] = parser.add_argument_group(topic)
        if isinstance(field.default, bool):
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"choices": field.metadata["choices"], **_kind(field)}
        action = groups[topic].add_argument(flag_name(field.name), default=field.default, **kind)
        action.help = _help(field).replace("%", "%%")  # set here: some versions of argparse append the default again


def _kind(field: dataclasses.Field) -> dict[str, Any]:
    """Arguments of ``add_argument`` for a field. A tuple takes one or more values of its item type."""
    is_tuple = isinstance(field.default, tuple)
    kind = typing.get_args(field.type)[0] if is_tuple else type(field.default)
    found: dict[str, Any] = {"type": KINDS.get(kind, kind)}
    if not field.metadata["choices"]:
        found["metavar"] = METAVARS[kind]
    return found | ({"nargs": "+"} if is_tuple else {})


def _help(field: dataclasses.Field) -> str:
    text, default, empty = field.metadata["help"], field.default, field.metadata["empty"]
    if field.metadata["required"]:
        return f"{text} (required)"
    if default in ("", ()):
        return f"{text} (default: {empty})"
    if isinstance(default, bool):
        value = "on" if default else "off"
    elif isinstance(default, int | float):
        value = f"{default:,.0f}" if default >= 1e5 else f"{default:g}"
    else:
        value = str(default)
    return f"{text} (default: {value}{empty and ', ' + empty})"


def from_flags(config: type, args: argparse.Namespace) -> Any:
    """Build the dataclass ``config`` from parsed flags. Raises the ValueErrors of its checks."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(config)}
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
