"""Converters of command-line values that several subcommands use."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def integer(smallest: int, largest: int | None = None) -> Callable[[str], int]:
    """Return a converter of argparse that refuses integers out of range."""
    legal = f"an integer >= {smallest}" if largest is None else f"an integer from {smallest} to {largest}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {legal}") from None
        if value < smallest or (largest is not None and value > largest):
            raise argparse.ArgumentTypeError(f"got {value}, expected {legal}")
        return value

    return convert


def number(smallest: float, largest: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Return a converter of argparse that refuses numbers out of range, ``smallest`` itself too if ``above``."""
    legal = f"a number {'>' if above else '>='} {smallest:g}" + ("" if largest == math.inf else f" and <= {largest:g}")

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {legal}") from None
        if not smallest <= value <= largest or (above and value == smallest) or math.isinf(value):
            raise argparse.ArgumentTypeError(f"got {text}, expected {legal}")
        return value

    return convert
