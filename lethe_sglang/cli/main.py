"""The ``lethe`` program: a table of subcommands, each a module that is imported only when it is asked for.

A subcommand's module has two functions: ``add_parser(subparsers)`` registers its parser under its name, and
``run(args)`` does the work and returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from lethe_sglang.config import ConfigError


class Command(NamedTuple):
    """Where a subcommand lives, and its line in ``lethe --help``."""

    module: str
    summary: str


COMMANDS = {
    "show": Command(
        "lethe_sglang.cli.show", "print the resolved configuration, a profile, the presets or the support matrix"
    ),
    "profile": Command("lethe_sglang.cli.profile", "measure a model's layers once, to share the budget among them"),
    "plan": Command("lethe_sglang.cli.plan", "work out what a deployment will hold, before it runs"),
    "bench": Command("lethe_sglang.cli.bench", "measure throughput and memory against stock SGLang"),
    "eval": Command("lethe_sglang.cli.eval", "measure accuracy against memory on live servers"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lethe`` and return its exit status.

    Parameters
    ----------
    argv
        The arguments after the program's name; None takes those of the process.

    Returns
    -------
    int
        0 if the subcommand succeeded, 2 if a configuration is at fault, else what the subcommand returned.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="lethe", description="Bounded KV memory for reasoning models on SGLang.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, command in COMMANDS.items():
        if name == asked:
            importlib.import_module(command.module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=command.summary)
    args = parser.parse_args(arguments)
    try:
        return int(importlib.import_module(COMMANDS[args.command].module).run(args))
    except ConfigError as error:
        print(f"lethe {args.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
