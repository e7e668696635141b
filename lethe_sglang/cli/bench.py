"""``lethe bench``: throughput and memory against stock SGLang, at the same KV pool."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe_sglang.config import ConfigError, EvictionConfig, from_mapping, resolve
from lethe_sglang.evaluation.bench import Measurement
from lethe_sglang.evaluation.bench import run as measure_all
from lethe_sglang.evaluation.bench_plan import ARMS, Plan
from lethe_sglang.evaluation.bench_report import About, to_json, to_markdown
from lethe_sglang.evaluation.servers import (
    ServerError,
    ending_on_signals,
    machine,
    port_free,
    some_free_port,
    versions,
)

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_OWN_SERVER_ARGS = {
    "--model-path": "--model-path",
    "--model": "--model-path",
    "--port": "--port",
    "--host": "",
    "--max-total-tokens": "--max-total-tokens",
    "--page-size": "--page-size",
    "--decode-log-interval": "",
    "--log-level": "",
    "--config": "",
    "--kv-evict": "--policy",
    "--kv-evict-config": "--config",
    "--kv-evict-budget": "--budget",
}
"""Server arguments that the benchmark sets, and the option of this program that changes them, if there is one."""


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe bench``."""
    parser = subparsers.add_parser(
        "bench",
        help="measure throughput and memory against stock SGLang",
        description="Serve one workload with the same KV pool by stock SGLang, by the plugin without a round ever due "
        "(idle) and by the plugin as configured (lethe), one server after the other; print the ratios as Markdown.",
        allow_abbrev=False,
    )

    def add(option: str, metavar: str, text: str, default: Any = None, **rest: Any) -> None:
        text += "" if default in (None, "") else " (default: %(default)s)"
        parser.add_argument(option, metavar=metavar, help=text, default=default, **rest)

    count = _integer(1)
    add("--model-path", "PATH", "directory or Hugging Face name of the model", required=True)
    add("--policy", "NAME", "policy of the lethe arm; beats the one in the configuration")
    add("--config", "FILE|JSON|PRESET", "configuration of the lethe arm, as for --kv-evict-config")
    add("--budget", "N", "mean tokens kept per layer; beats budget.tokens", type=count)
    add("--interval", "N", "tokens between two rounds; beats rounds.interval", type=count)
    add("--input-len", "N", "tokens of every prompt", 64, type=count)
    add("--output-len", "N", "tokens of every answer", 1024, type=_integer(2))
    add("--requests", "N", "requests of one measurement", 32, type=count)
    add("--concurrency", "N", "requests that the client keeps open at a time", 32, type=count)
    add("--max-total-tokens", "N", "KV pool of every arm, in tokens", 4096, type=count)
    add("--page-size", "N", "page size of every arm (default: SGLang's)", type=count)
    add("--repeats", "N", "measurements of each arm, interleaved", 3, type=count)
    add("--arms", "LIST", "arms to measure, separated by commas", ",".join(ARMS))
    add("--port", "N", "port of the servers, on 127.0.0.1", 31000, type=_integer(1, 65535))
    add("--server-args", "ARGS", "more arguments of every server: --server-args='--tp 2'", "")
    add("--seed", "N", "seed of the prompts", 1, type=_integer(0))
    add("--timeout", "S", "longest measurement in seconds, the server's start apart", 3600, type=count)
    add("--out", "DIR", "write bench.json and bench.md there, after every measurement", type=Path)


def run(args: argparse.Namespace) -> int:
    """Measure, print the Markdown and return the exit status.

    Raises
    ------
    ConfigError
        If an option or the configuration cannot be used.
    """
    try:
        plan = plan_of(args)
        plan.check()
        _check_surroundings(plan, args.out)
    except ConfigError as error:
        raise ConfigError(_own_names(str(error))) from None
    about = About(_command(args, plan), machine(), versions())
    measurements: list[Measurement] = []
    try:
        with ending_on_signals():
            for measured in measure_all(plan, _say):
                measurements.append(measured)
                _write(args.out, plan, measurements, about)
    except ServerError as error:
        print(f"lethe bench: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lethe bench: interrupted", file=sys.stderr)
        return 130
    finally:
        if measurements:
            print(to_markdown(plan, measurements, about))
    return 0


def plan_of(args: argparse.Namespace) -> Plan:
    """Turn the parsed options into a plan.

    Raises
    ------
    ConfigError
        If the configuration is not legal or ``--server-args`` holds what the benchmark sets itself.
    """
    names = (
        "model_path",
        "input_len",
        "output_len",
        "requests",
        "concurrency",
        "max_total_tokens",
        "page_size",
        "repeats",
        "port",
        "seed",
        "timeout",
    )
    arms = tuple(arm.strip() for arm in args.arms.split(",") if arm.strip())
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    return Plan(config=_config(args), arms=arms, server_args=_server_args(args.server_args), **options)


def _config(args: argparse.Namespace) -> EvictionConfig:
    config = resolve(args.policy, args.config, args.budget)
    if args.interval is None:
        return config
    data = config.model_dump(mode="json")
    data["rounds"]["interval"] = args.interval
    return from_mapping(data, where=f"--interval {args.interval}")


def _server_args(text: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"--server-args {text!r}: {error}; quote each argument as in a shell") from None
    for word in words:
        name = word.partition("=")[0]
        if (instead := _OWN_SERVER_ARGS.get(name)) is not None:
            hint = f"use {instead} of lethe bench" if instead else "leave it out"
            raise ConfigError(f"--server-args: '{name}' is set by lethe bench for every arm; {hint}")
    return words


def _own_names(message: str) -> str:
    """Call the server's options by the names that they have here."""
    for theirs, ours in (("-config", "--config"), ("-budget", "--budget"), ("", "--policy")):
        message = re.sub(rf"(?<![\w'-])--kv-evict{theirs}(?![\w-])", ours, message)
    return message.replace("legal: none, ", "legal: ")


def _check_surroundings(plan: Plan, out: Path | None) -> None:
    """Refuse what would fail only after a server's start."""
    from lethe_sglang.policies import build_policy  # torch: only when something is measured

    build_policy(plan.config)
    path = Path(plan.model_path)
    if path.is_dir() != (path / "config.json").is_file() or (not path.is_dir() and not _hub_name(plan.model_path)):
        raise ConfigError(f"--model-path {plan.model_path}: no model there; give a directory with a config.json")
    if not port_free(plan.port):
        raise ConfigError(f"--port {plan.port}: in use; give another, such as --port {some_free_port()}")
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror}; give a directory that can be written to") from None


def _hub_name(name: str) -> bool:
    return not name.startswith(("/", ".", "~")) and name.count("/") <= 1


def _command(args: argparse.Namespace, plan: Plan) -> str:
    """Write the command line of this run with every value in it and no path of this machine."""
    words = ["lethe", "bench", "--model-path", plan.model_name]
    shown = {name: value for name, value in vars(args).items() if name not in ("command", "model_path", "out", "port")}
    if args.config is not None and not args.config.lstrip().startswith("{"):
        shown["config"] = Path(args.config).name
    shown["server_args"] = shlex.join(plan.readable(plan.server_args))
    for name, value in shown.items():
        if value not in (None, ""):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _write(out: Path | None, plan: Plan, measurements: list[Measurement], about: About) -> None:
    if out is None:
        return
    (out / "bench.json").write_text(json.dumps(to_json(plan, measurements, about), indent=1) + "\n", encoding="utf-8")
    (out / "bench.md").write_text(to_markdown(plan, measurements, about) + "\n", encoding="utf-8")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _integer(smallest: int, largest: int | None = None) -> Callable[[str], int]:
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
