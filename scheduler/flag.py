"""Dataclass fields that become command-line flags: a default, what the flag means, its topic and what it must be."""

import dataclasses
from dataclasses import field
from typing import Any

from euryale.client.rules import Rule


def flag(
    default: Any,
    help: str,
    topic: str,
    rule: Rule | None = None,
    *,
    empty: str = "",
    choices: tuple[str, ...] | None = None,
    required: bool = False,
) -> Any:
    """A field that is the flag of the same name. ``help`` names the unit, ``empty`` says in words what a default of
    0, of no text or of no items means, ``topic`` is the group of --help it stands in."""
    metadata = {"help": help, "topic": topic, "rule": rule, "empty": empty, "choices": choices, "required": required}
    return field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """How a field is spelled on the command line."""
    return f"--{field_name.replace('_', '-')}"


def check_flags(settings: Any) -> None:
    """Raise ValueError, naming the flag, for a value that is missing or breaks its rule."""
    for found in dataclasses.fields(settings):
        value, metadata = getattr(settings, found.name), found.metadata
        if metadata["required"] and not value:
            raise ValueError(f"{flag_name(found.name)} is missing: give the {metadata['help']}")
        if metadata["rule"]:
            metadata["rule"].check(flag_name(found.name), value)
        if metadata["choices"] and value not in metadata["choices"]:
            raise ValueError(
                f"{flag_name(found.name)} must be one of {', '.join(metadata['choices'])}, not {str(value)[:60]}"
            )
