"""``lethe burst``: what short requests wait for when long ones have filled the pool."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lethe_bench.cli.bench import add_options, checked_plan
from lethe_bench.cli.load import ARMS, measured
from lethe_bench.cli.options import integer
from lethe_bench.load.plan import Burst

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe burst``."""
    parser = subparsers.add_parser(
        "burst",
        description="Let long requests fill a KV pool, then send many short ones at once; time the short ones' first "
        "tokens and count the long ones' meanwhile, with stock SGLang and the plugin with rounds always and under "
        "pressure; write burst.md, burst.json and a picture. What is done already is not done again; Ctrl-C is safe.",
        allow_abbrev=False,
    )
    add = add_options(parser, ARMS, "the evicting arms", "of every long request")
    add("--long-requests", "N", "long requests", 8, type=integer(1))
    add("--short-requests", "N", "short requests", 32, type=integer(1))
    add("--short-input-len", "N", "tokens of every prompt of a short one", 64, type=integer(1))
    add("--short-output-len", "N", "tokens of every answer to a short one", 32, type=integer(1))
    text = "output tokens of the long requests, all together, when the short ones come (default: what fills the pool)"
    add("--after", "N", text, type=integer(1))
    add("--out", "DIR", "results directory", Path("out/burst"), type=Path)


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, write and print the page and return the exit status.

    Raises
    ------
    ConfigError
        If an option or the configuration cannot be used.
    """
    more = ("long_requests", "short_requests", "short_input_len", "short_output_len", "after")
    return measured(args, checked_plan(args, Burst, more))
