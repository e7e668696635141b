"""``lethe sensitivity``: prune one layer at a time, and add to a profile how many answers that changes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lethe_bench.cli import server_args
from lethe_bench.cli.options import check_model, check_out, integer, number
from lethe_sglang.allocation.profile import Profile, Rule, load, save
from lethe_sglang.cli.show_profile import render
from lethe_sglang.config import resolve
from lethe_sglang.processes import ending_on_signals
from lethe_sglang.profiling.run import Pass, prompts_of, with_rule

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

RULE: Rule = "sensitivity"
_OWN = {
    "--model-path": "use --model-path of lethe sensitivity",
    "--random-seed": "",
    "--disable-cuda-graph": "",
    "--kv-evict": "use --config of lethe sensitivity",
    "--kv-evict-config": "use --config of lethe sensitivity",
    "--kv-evict-budget": "use --budget of lethe sensitivity",
}


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe sensitivity``."""
    parser = subparsers.add_parser(
        "sensitivity",
        description="Let the model answer calibration prompts greedily, uncompressed and then once per layer with "
        "that layer alone pruned to half of --budget, count the answers that change, and write the profile with that "
        "statistic and the rule that shares the budget by it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="a profile of the model, as lethe profile writes it")
    add("-o", "--out", metavar="NEW", type=Path, required=True, help="where the new profile goes")
    add("--model-path", metavar="PATH", required=True, help="directory or Hugging Face name of the model")
    add(
        "--config",
        metavar="FILE|JSON|PRESET",
        help="policy, rounds and retention of the pruned layer, as for --kv-evict-config",
    )
    add(
        "--budget",
        metavar="N",
        type=integer(2),
        help="mean tokens kept per layer; beats budget.tokens (default: FILE's, without --config)",
    )
    add("--alpha", metavar="A", type=number(-16, 16), default=1.0, help="exponent of the shares (default: %(default)s)")
    add("--prompts", metavar="FILE", type=Path, help="calibration prompts, as for lethe profile")
    add("--num-prompts", metavar="N", type=integer(1), help="most prompts (default: as many as FILE was made of)")
    add("--max-new-tokens", metavar="N", type=integer(2), help="longest answer (default: FILE's)")
    add("--seed", metavar="N", type=integer(0), help="of the generated prompts (default: FILE's)")
    add("--raw", action="store_true", help="put prompts as they are, without the chat template")
    add("--server-args", metavar="ARGS", default="", help="more arguments of SGLang: --server-args='--tp 2'")


def run(args: argparse.Namespace) -> int:
    """Measure, write and print the profile, and return the exit status.

    Raises
    ------
    ConfigError
        If an option, the prompts, the profile or the model cannot be used.
    """
    old = load(args.file)
    task = _pass(args, old)
    check_model(args.model_path)
    check_out(args.out)
    from lethe_bench import one_layer
    from lethe_bench.accuracy.prompts import Prompts

    with ending_on_signals():
        found = one_layer.run(task, prompts_of(task, Prompts(task.model_path).tokenizer), old)
    profile = with_rule(old.model_copy(update={RULE: found}), RULE, args.alpha, task.config)
    save(profile, args.out)
    print(render(profile))
    print(f"written to {args.out}")
    return 0


def _pass(args: argparse.Namespace, old: Profile) -> Pass:
    """Return what to measure: what is not given is as in the pass that the profile is of."""
    tokens = old.budgets.tokens if args.budget is None and args.config is None else args.budget
    settings = old.settings
    return Pass(
        model_path=args.model_path,
        prompts=args.prompts,
        num_prompts=args.num_prompts or old.prompts.count,
        max_new_tokens=args.max_new_tokens or settings.max_new_tokens,
        seed=settings.seed if args.seed is None else args.seed,
        raw=args.raw,
        config=resolve(None, args.config, tokens),
        server_args=server_args.split(args.server_args, "lethe sensitivity", _OWN),
    )
