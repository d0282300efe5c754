"""Command-line helpers of the benchmarks: bounded integers, and one-line error messages."""

import argparse
from collections.abc import Callable


def number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return an argparse type for integers from ``low`` to ``high``."""

    def read(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{value} is not {bounds}")
        return value

    read.__name__ = "whole number"  # the name that argparse prints for invalid values
    return read


def run(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], None]) -> None:
    """Call ``main`` with the parsed command line; a ValueError ends the program with one line and exit code 2."""
    args = parser.parse_args()
    try:
        main(args)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
