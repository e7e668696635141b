"""``lethe profile``: measure a model's layers once and write the profile that budget allocation ``profile`` reads."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lethe_bench.cli import server_args
from lethe_bench.cli.options import check_model, check_out, integer, number
from lethe_sglang.allocation.profile import MEASURED_BY, Profile, Rule, load, save
from lethe_sglang.cli.show_profile import render
from lethe_sglang.config import ConfigError, resolve
from lethe_sglang.processes import ending_on_signals
from lethe_sglang.profiling.run import Pass, measure, with_rule

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_OWN = {
    "--model-path": "use --model-path of lethe profile",
    "--random-seed": "use --seed of lethe profile",
    "--max-running-requests": "use --concurrency of lethe profile",
    "--disable-overlap-schedule": "",
    "--kv-evict": "leave it out: a profile is of the uncompressed model",
    "--kv-evict-config": "use --config of lethe profile",
    "--kv-evict-budget": "use --budget of lethe profile",
}


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe profile``."""
    parser = subparsers.add_parser(
        "profile",
        description="Let the model answer calibration prompts through SGLang, uncompressed, measure the attention of "
        "every layer, and write the profile (YAML). Ctrl-C keeps what is done; the same command goes on from there. "
        "With --from, write a profile that was measured before with another rule; nothing is measured.",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model-path", metavar="PATH", help="directory or Hugging Face name of the model")
    what.add_argument("--from", metavar="FILE", type=Path, dest="source", help="a profile to write with another rule")

    both = parser.add_argument_group("the profile")
    both.add_argument(
        "--rule",
        choices=get_args(Rule),
        help=f"how servers share the budget by this profile (default: {Pass.rule}, with --from the file's)",
    )
    both.add_argument(
        "--alpha",
        metavar="A",
        type=number(-16, 16),
        default=1.0,
        help="exponent of the layers' shares: 0 is uniform, larger more uneven, negative turns their order round "
        "(default: %(default)s)",
    )
    both.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        type=Path,
        help="where it goes (default: where a server with profile auto looks for it; needed with --from)",
    )
    both.add_argument(
        "--config",
        metavar="FILE|JSON|PRESET",
        help="configuration whose budgets are written along, as for --kv-evict-config",
    )
    both.add_argument("--budget", metavar="N", type=integer(2), help="mean tokens kept per layer; beats budget.tokens")

    # What is not given is left out, so that Pass alone says the defaults and --from can refuse what it would not read.
    def add(name: str, **options: Any) -> None:
        measuring.add_argument(name, default=argparse.SUPPRESS, **options)

    measuring = parser.add_argument_group("the measuring")
    add(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="calibration prompts: JSONL, ShareGPT JSON or plain text, one a line (default: lethe_prompts.jsonl of the "
        "model's directory, else generated reasoning problems)",
    )
    add("--num-prompts", metavar="N", type=integer(1), help=f"most prompts (default: {Pass.num_prompts})")
    add("--max-new-tokens", metavar="N", type=integer(2), help=f"longest answer (default: {Pass.max_new_tokens})")
    add("--temperature", metavar="T", type=number(0), help="of the answers (default: 0, greedy)")
    add(
        "--seed",
        metavar="N",
        type=integer(0),
        help=f"of sampling and of the generated prompts (default: {Pass.seed})",
    )
    add("--concurrency", metavar="N", type=integer(1), help=f"prompts at a time (default: {Pass.concurrency})")
    add(
        "--time-limit",
        metavar="S",
        type=number(0, above=True),
        help="start no further prompts after so many seconds of measuring (default: none)",
    )
    add("--raw", action="store_true", help="put prompts as they are, without the chat template")
    add("--server-args", metavar="ARGS", help="more arguments of SGLang: --server-args='--tp 2'")


def run(args: argparse.Namespace) -> int:
    """Measure or rewrite, print the profile's table and return the exit status.

    Raises
    ------
    ConfigError
        If an option, the prompts, the profile or the model cannot be used.
    """
    names = {field.name for field in fields(Pass)} - {"model_path", "rule", "alpha", "config", "out"}
    given = {name: value for name, value in vars(args).items() if name in names}
    if args.source is not None:
        profile, path = _rewrite(args, set(given))
    else:
        with ending_on_signals():
            profile, path = measure(_pass(args, given))
    print(render(profile))
    print(f"written to {path}")
    return 0


def _rewrite(args: argparse.Namespace, unread: set[str]) -> tuple[Profile, Path]:
    if unread:
        raise ConfigError(f"--{min(unread).replace('_', '-')}: nothing is measured with --from; leave it out")
    if args.out is None:
        raise ConfigError("--out: needed with --from; give a file")
    check_out(args.out)
    old = load(args.source, f"--from {args.source}")
    tokens = old.budgets.tokens if args.budget is None and args.config is None else args.budget
    profile = with_rule(old, args.rule or old.rule, args.alpha, resolve(None, args.config, tokens))
    save(profile, args.out)
    return profile, args.out


def _pass(args: argparse.Namespace, given: dict[str, Any]) -> Pass:
    config = resolve(None, args.config, args.budget)
    words = server_args.split(given.pop("server_args", ""), "lethe profile", _OWN)
    rule = args.rule or Pass.rule
    if rule in MEASURED_BY:
        raise ConfigError(f"--rule {rule}: not measured here; {MEASURED_BY[rule]} adds it to a profile")
    check_model(args.model_path)
    if args.out is not None:
        check_out(args.out)
    shared = {"rule": rule, "alpha": args.alpha, "config": config, "server_args": words}
    return Pass(model_path=args.model_path, out=args.out, **given, **shared)
