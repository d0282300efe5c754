"""Command-line flags from configuration dataclasses: one place for a name, a default and a help text."""

import argparse
import dataclasses
import typing


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Add one ``--flag-name`` for every field of the dataclass; booleans also get ``--no-flag-name``."""
    group = parser.add_argument_group(config.__name__)
    for field in dataclasses.fields(config):
        name = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if field.default not in ("", 0, 0.0, ()) and field.default is not dataclasses.MISSING:
            text += f" (default: {field.default})"
        if isinstance(field.default, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            choices = field.metadata["choices"]
            group.add_argument(name, default=field.default, choices=choices, help=text, **_kind(field))


def _kind(field: dataclasses.Field) -> dict:
    """How argparse reads a field: a tuple takes one or more values of its only item type."""
    if isinstance(field.default, tuple):
        return {"type": typing.get_args(field.type)[0], "nargs": "+"}
    return {"type": type(field.default)}


def from_flags(config: type, args: argparse.Namespace):
    """The dataclass that the parsed flags describe; ValueError as its own checks."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(config)}
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
