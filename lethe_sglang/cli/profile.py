"""``lethe profile``: measure a model's layers once and write the profile that ``budget.allocation`` reads."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lethe_sglang.cli.options import integer, number
from lethe_sglang.cli.show_profile import render
from lethe_sglang.config import ConfigError, resolve

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_OWN = {
    "--model-path": "use --model-path of lethe profile",
    "--model": "use --model-path of lethe profile",
    "--random-seed": "use --seed of lethe profile",
    "--max-running-requests": "use --concurrency of lethe profile",
    "--disable-overlap-schedule": "leave it out",
    "--kv-evict": "leave it out: a profile is of the uncompressed model",
    "--kv-evict-config": "use --config of lethe profile",
    "--kv-evict-budget": "use --budget of lethe profile",
    "--kv-evict-profile": "leave it out",
}


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe profile``."""
    parser = subparsers.add_parser(
        "profile",
        help="measure a model's layers once, to share the budget among them",
        description="Let the model answer calibration prompts through SGLang, uncompressed, measure the attention of "
        "every layer, and write the profile (YAML). Ctrl-C keeps what is done; the same command goes on from there.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model-path", metavar="PATH", required=True, help="directory or Hugging Face name of the model")
    add(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="calibration prompts: JSONL, ShareGPT JSON or plain text, one a line (default: lethe_prompts.jsonl of the "
        "model's directory, else generated reasoning problems)",
    )
    add("--out", metavar="FILE", type=Path, help="the profile (default: where a server with profile auto looks for it)")
    add("--num-prompts", metavar="N", type=integer(1), default=16, help="most prompts (default: %(default)s)")
    add("--max-new-tokens", metavar="N", type=integer(2), default=256, help="longest answer (default: %(default)s)")
    add("--temperature", metavar="T", type=number(0), default=0.0, help="of the answers (default: 0, greedy)")
    add(
        "--seed",
        metavar="N",
        type=integer(0),
        default=1,
        help="of sampling and of the generated prompts (default: %(default)s)",
    )
    add("--concurrency", metavar="N", type=integer(1), default=4, help="prompts at a time (default: %(default)s)")
    add(
        "--time-limit",
        metavar="S",
        type=number(0, above=True),
        help="start no further prompts after so many seconds of measuring (default: none)",
    )
    add(
        "--sensitivity",
        action="store_true",
        help="answer once more per layer, that layer alone pruned to half of --budget; for allocation sensitivity",
    )
    add("--raw", action="store_true", help="put prompts as they are, without the chat template")
    add(
        "--config",
        metavar="FILE|JSON|PRESET",
        help="configuration whose budgets are written along, as for --kv-evict-config",
    )
    add("--budget", metavar="N", type=integer(2), help="mean tokens kept per layer; beats budget.tokens")
    add("--server-args", metavar="ARGS", default="", help="more arguments of SGLang: --server-args='--tp 2'")


def run(args: argparse.Namespace) -> int:
    """Measure, print the profile's table and return the exit status.

    Raises
    ------
    ConfigError
        If an option, the prompts or the model cannot be used.
    """
    config = resolve(None, args.config, args.budget)
    server_args = _server_args(args.server_args)
    _check_paths(args.model_path, args.out)
    from lethe_sglang.engine.profile_pass import ended_by_signals
    from lethe_sglang.profiling.prompts import read
    from lethe_sglang.profiling.run import Interrupted, Pass, measure

    if args.prompts is not None:
        read(args.prompts)
    task = Pass(
        model_path=args.model_path,
        prompts=args.prompts,
        out=args.out,
        count=args.num_prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        concurrency=args.concurrency,
        time_limit=args.time_limit,
        raw=args.raw,
        sensitivity=args.sensitivity,
        config=config,
        server_args=server_args,
    )
    try:
        with ended_by_signals():
            profile, path = measure(task)
    except (Interrupted, KeyboardInterrupt) as stopped:
        print(f"lethe profile: interrupted{f'; {stopped}' if str(stopped) else ''}", file=sys.stderr)
        return 130
    print(render(profile))
    print(f"written to {path}")
    return 0


def _server_args(text: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"--server-args {text!r}: {error}; quote each argument as in a shell") from None
    for word in words:
        if (instead := _OWN.get(word.partition("=")[0])) is not None:
            raise ConfigError(f"--server-args: {word.partition('=')[0]} is set by lethe profile; {instead}")
    return words


def _check_paths(model_path: str, out: Path | None) -> None:
    """Refuse what would fail only after the model has been loaded."""
    path = Path(model_path)
    local = model_path.startswith(("/", ".", "~")) or model_path.count("/") > 1 or path.is_dir()
    if local and not (path / "config.json").is_file():
        raise ConfigError(f"--model-path {model_path}: no model there; give a directory with a config.json")
    if out is None:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}; give a file in a directory that can be written to") from None
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: cannot be written; give a file in a directory that can be written to")
