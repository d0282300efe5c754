"""What the benchmarks' command lines have in common: whole numbers within bounds, and one line for what a user can
mend."""

import argparse
from collections.abc import Callable


def number(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from ``low`` to ``high``."""

    def read(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{value} is not {bounds}")
        return value

    read.__name__ = "whole number"  # what argparse calls it where it is none
    return read


def run(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], None]) -> None:
    """``main`` on the parsed command line; a ValueError ends in one line and exit code 2."""
    args = parser.parse_args()
    try:
        main(args)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
