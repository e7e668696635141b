"""``lethe bench``: throughput and memory against stock SGLang, at the same KV pool."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lethe_bench.cli import server_args
from lethe_bench.cli.checks import check_ports, say
from lethe_bench.cli.options import check_model, integer
from lethe_bench.machine import machine, versions
from lethe_bench.servers import ServerError
from lethe_bench.throughput.measure import Measurement
from lethe_bench.throughput.measure import run as measure_all
from lethe_bench.throughput.plan import Arms, Plan
from lethe_bench.throughput.report import About, to_json, to_markdown
from lethe_sglang.config import ConfigError, EvictionConfig, from_mapping, resolve
from lethe_sglang.files import write_atomically
from lethe_sglang.processes import ending_on_signals

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

P = TypeVar("P", bound=Arms)

_OWN_SERVER_ARGS = {
    "--model-path": "use the command's --model-path",
    "--port": "use the command's --port",
    "--host": "",
    "--max-total-tokens": "use the command's --max-total-tokens",
    "--page-size": "use the command's --page-size",
    "--decode-log-interval": "",
    "--log-level": "",
    "--config": "",
    "--kv-evict": "use the command's --policy",
    "--kv-evict-config": "use the command's --config",
    "--kv-evict-budget": "use the command's --budget",
    "--kv-evict-profile": "use the command's --config",
}
"""Server arguments that the benchmark sets, and the option that changes them, if there is one."""


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe bench``."""
    parser = subparsers.add_parser(
        "bench",
        description="Serve one workload with the same KV pool by stock SGLang, by the plugin without a round ever due "
        "(idle) and by the plugin as configured (lethe), one server after the other; print the ratios as Markdown.",
        allow_abbrev=False,
    )

    add = add_options(parser, Plan.legal_arms, "the lethe arm")
    add("--requests", "N", "requests of one measurement", 32, type=integer(1))
    add("--concurrency", "N", "requests that the client keeps open at a time", 32, type=integer(1))
    add("--out", "DIR", "write bench.json and bench.md there, after every measurement", type=Path)


def add_options(
    parser: argparse.ArgumentParser, arms: Sequence[str], whose: str, of: str = "of every request"
) -> Callable[..., None]:
    """Add what all benchmarks of this kind take to a parser, and return what adds more options in the same form.

    Parameters
    ----------
    arms
        Those that are measured unless others are named.
    whose
        The arms that have the configuration that is asked for.
    of
        The requests whose lengths are ``--input-len`` and ``--output-len``.
    """

    def add(option: str, metavar: str, text: str, default: Any = None, **rest: Any) -> None:
        text += "" if default in (None, "") else " (default: %(default)s)"
        parser.add_argument(option, metavar=metavar, help=text, default=default, **rest)

    count = integer(1)
    add("--model-path", "PATH", "directory or Hugging Face name of the model", required=True)
    add("--policy", "NAME", f"policy of {whose}; beats the one in the configuration")
    add("--config", "FILE|JSON|PRESET", f"configuration of {whose}, as for --kv-evict-config")
    add("--budget", "N", "mean tokens kept per layer; beats budget.tokens", type=count)
    add("--interval", "N", "tokens between two rounds; beats rounds.interval", type=count)
    add("--input-len", "N", f"tokens {of}'s prompt", 64, type=count)
    add("--output-len", "N", f"tokens {of}'s answer", 1024, type=integer(2))
    add("--max-total-tokens", "N", "KV pool of every arm, in tokens", 4096, type=count)
    add("--page-size", "N", "page size of every arm (default: SGLang's)", type=count)
    add("--repeats", "N", "measurements of each arm, interleaved", 3, type=count)
    add("--arms", "LIST", "arms to measure, separated by commas", ",".join(arms))
    add("--port", "N", "port of the servers, on 127.0.0.1", 31000, type=integer(1, 65535))
    add("--server-args", "ARGS", "more arguments of every server: --server-args='--tp 2'", "")
    add("--seed", "N", "seed of the prompts", 1, type=integer(0))
    add("--timeout", "S", "longest measurement in seconds, the server's start apart", 3600, type=count)
    return add


def run(args: argparse.Namespace) -> int:
    """Measure, print the Markdown and return the exit status.

    Raises
    ------
    ConfigError
        If an option or the configuration cannot be used.
    """
    plan = checked_plan(args, Plan, ("requests", "concurrency"))
    about = about_of(args, plan)
    measurements: list[Measurement] = []
    try:
        with ending_on_signals():
            for measured in measure_all(plan, say):
                measurements.append(measured)
                _write(args.out, plan, measurements, about)
    except ServerError as error:
        print(f"lethe bench: error: {error}", file=sys.stderr)
        return 1
    finally:
        if measurements:
            print(to_markdown(plan, measurements, about))
    return 0


def checked_plan(args: argparse.Namespace, kind: type[P], more: Sequence[str]) -> P:
    """Turn the parsed options into a plan that can be measured here.

    Parameters
    ----------
    kind
        The plan's class.
    more
        Its fields besides those that all plans have; each is an option.

    Raises
    ------
    ConfigError
        If an option or the configuration cannot be used.
    """
    try:
        plan = plan_of(args, kind, more)
        plan.check()
        _check_surroundings(plan, args.out)
    except ConfigError as error:
        raise ConfigError(_own_names(str(error))) from None
    return plan


def plan_of(args: argparse.Namespace, kind: type[P], more: Sequence[str]) -> P:
    """Turn the parsed options into a plan.

    Raises
    ------
    ConfigError
        If the configuration is not legal or ``--server-args`` holds what the benchmark sets itself.
    """
    names = ("model_path", "input_len", "output_len", "max_total_tokens", "page_size", "repeats", "port", "seed")
    arms = tuple(arm.strip() for arm in args.arms.split(",") if arm.strip())
    options: dict[str, Any] = {name: getattr(args, name) for name in (*names, "timeout", *more)}
    words = server_args.split(args.server_args, f"lethe {args.command}", _OWN_SERVER_ARGS)
    return kind(config=_config(args), arms=arms, server_args=words, **options)


def about_of(args: argparse.Namespace, plan: Arms) -> About:
    """Return what a reader needs besides the numbers."""
    return About(_command(args, plan), machine(), versions())


def _config(args: argparse.Namespace) -> EvictionConfig:
    config = resolve(args.policy, args.config, args.budget)
    if args.interval is None:
        return config
    data = config.model_dump(mode="json")
    data["rounds"]["interval"] = args.interval
    return from_mapping(data, where=f"--interval {args.interval}")


def _own_names(message: str) -> str:
    """Call the server's options by the names that they have here."""
    for theirs, ours in (("-config", "--config"), ("-budget", "--budget"), ("", "--policy")):
        message = re.sub(rf"(?<![\w'-])--kv-evict{theirs}(?![\w-])", ours, message)
    return message.replace("legal: none, ", "legal: ")


def _check_surroundings(plan: Arms, out: Path | None) -> None:
    """Refuse what would fail only after a server's start."""
    check_model(plan.model_path)
    check_ports(plan.port)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror}; give a directory that can be written to") from None


def _command(args: argparse.Namespace, plan: Arms) -> str:
    """Write the command line of this run with every value in it and no path of this machine."""
    words = ["lethe", args.command, "--model-path", plan.model_name]
    shown = {name: value for name, value in vars(args).items() if name not in ("command", "model_path", "out", "port")}
    if args.config is not None and not args.config.lstrip().startswith("{"):
        shown["config"] = Path(args.config).name
    shown["server_args"] = shlex.join(plan.readable(plan.server_args))
    for name, value in shown.items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value not in (None, "", False):
            shown_value = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", shown_value]
    return shlex.join(words)


def _write(out: Path | None, plan: Plan, measurements: list[Measurement], about: About) -> None:
    if out is None:
        return
    write_atomically(out / "bench.json", json.dumps(to_json(plan, measurements, about), indent=1) + "\n")
    write_atomically(out / "bench.md", to_markdown(plan, measurements, about) + "\n")
