"""Command-line values that several commands take: their converters, and what is checked before anything starts."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

from lethe_sglang.config import ConfigError


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


def check_model(model_path: str, option: str = "--model-path", instead: str = "") -> None:
    """Refuse a model that is neither a directory with a config.json nor a name on a hub.

    Raises
    ------
    ConfigError
        With one line that names the ``option`` and, behind a legal value, what else to do ``instead``.
    """
    path = Path(model_path)
    on_a_hub = not model_path.startswith(("/", ".", "~")) and model_path.count("/") <= 1
    if path.is_dir() != (path / "config.json").is_file() or not (path.is_dir() or on_a_hub):
        raise ConfigError(f"{option} {model_path}: no model there; give a directory with a config.json{instead}")


def check_out(out: Path) -> None:
    """Refuse a file that could not be written, before the work that it is the result of.

    Raises
    ------
    ConfigError
        With one line that names ``--out``.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}; give a file in a directory that can be written to") from None
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: cannot be written; give a file in a directory that can be written to")
