"""``lethe load``: throughput, retractions, memory and rounds against the number of requests at once."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lethe_bench.cli.bench import about_of, add_options, checked_plan
from lethe_bench.cli.checks import say
from lethe_bench.load.plan import LOADS, Sweep
from lethe_bench.servers import ServerError
from lethe_sglang.files import write_atomically
from lethe_sglang.processes import ending_on_signals

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

ARMS = ("stock", "always", "pressure")


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe load``."""
    parser = subparsers.add_parser(
        "load",
        description="Serve 1 to 64 requests at once with the same KV pool by stock SGLang, by the plugin with rounds "
        "always and with rounds under pressure (arm idle: with no round ever due), on one server for each arm and "
        "repeat; write load.md, load.json and a picture. What is done already is not done again; Ctrl-C is safe.",
        allow_abbrev=False,
    )
    add = add_options(parser, ARMS, "the evicting arms")
    add("--loads", "LIST", "requests at once, one load after the other", ",".join(map(str, LOADS)), type=loads)
    parser.add_argument(
        "--one-server",
        action="store_true",
        help="let one server take the configurations of the evicting arms in turn: less depends on what else runs",
    )
    add("--out", "DIR", "results directory", Path("out/load"), type=Path)


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, write and print the page and return the exit status.

    Raises
    ------
    ConfigError
        If an option or the configuration cannot be used.
    """
    return measured(args, checked_plan(args, Sweep, ("loads", "one_server")))


def measured(args: argparse.Namespace, plan: Sweep) -> int:
    """Measure what a plan lacks in a results directory, write and print the page and return the exit status.

    Raises
    ------
    ConfigError
        If the directory holds something else.
    KeyboardInterrupt
        That says how to go on.
    """
    from transformers import AutoConfig  # slow to import

    from lethe_bench.load import report
    from lethe_bench.load.run import Samples, asked
    from lethe_bench.load.run import run as measure_all

    about, name, out = about_of(args, plan), args.command, args.out
    grows = ("repeats", "arms", "loads", "port", "timeout")
    settings = {key: value for key, value in vars(plan).items() if key not in (*grows, "config", "model_path")}
    settings |= {"model": plan.model_name, "server_args": plan.readable(plan.server_args), "versions": about.versions}
    samples = Samples(out, {**settings, "config": plan.config.model_dump(mode="json")})
    vocabulary = AutoConfig.from_pretrained(plan.model_path).get_text_config().vocab_size

    def write(picture: str = "") -> str:
        found = asked(plan, samples.found)
        write_atomically(out / f"{name}.json", json.dumps(report.to_json(plan, found, about), indent=1) + "\n")
        page = report.to_markdown(plan, found, about, picture)
        write_atomically(out / f"{name}.md", page + "\n")
        return page

    try:
        with ending_on_signals():
            for sample in measure_all(plan, samples.found, vocabulary, say):
                samples.add(sample)
                write()
    except ServerError as error:
        print(f"lethe {name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where this one stopped") from None
    print(write(report.draw(out / f"{name}.svg", plan, asked(plan, samples.found))))
    return 0


def loads(text: str) -> tuple[int, ...]:
    """Convert a list of loads for argparse."""
    try:
        found = tuple(map(int, text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1 or list(found) != sorted(set(found)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected increasing integers >= 1, such as 1,8,64")
    return found
