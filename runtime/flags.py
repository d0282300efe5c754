"""Command-line flags from configuration dataclasses: one place for a name, a default and a help text."""

import argparse
import dataclasses


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Add one ``--flag-name`` for every field of the dataclass; booleans also get ``--no-flag-name``."""
    group = parser.add_argument_group(config.__name__)
    for field in dataclasses.fields(config):
        name = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if field.default not in ("", 0, 0.0) and field.default is not dataclasses.MISSING:
            text += f" (default: {field.default})"
        if isinstance(field.default, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            kind, choices = type(field.default), field.metadata["choices"]
            group.add_argument(name, type=kind, default=field.default, choices=choices, help=text)


def from_flags(config: type, args: argparse.Namespace):
    """The dataclass that the parsed flags describe; ValueError as its own checks."""
    return config(**{field.name: getattr(args, field.name) for field in dataclasses.fields(config)})
