"""``lethe show``: what a set of flags resolves to, which presets exist, what is supported, what a profile holds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lethe_sglang.allocation.profile import load
from lethe_sglang.cli import show_profile
from lethe_sglang.config import ConfigError, EvictionConfig, presets, resolve
from lethe_sglang.config.loading import write_yaml
from lethe_sglang.config.reference import configuration_page, policies_page
from lethe_sglang.policies import policy_names
from lethe_sglang.policies.registry import IN_TREE

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_WIDE = 1_000_000
"""Columns before the YAML writer breaks a line: a list of one number per layer stays on its line."""


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe show``."""
    parser = subparsers.add_parser(
        "show",
        description="Print the configuration that the flags resolve to, as YAML that --kv-evict-config accepts; or, "
        "with profile FILE, the statistics and budgets of a profile.",
        usage="lethe show [profile FILE] [--kv-evict ...] [--presets | --policies | --options | --support]",
        allow_abbrev=False,
    )
    parser.add_argument("what", nargs="*", metavar="profile FILE", help="show a profile")
    parser.add_argument("--kv-evict", metavar="NAME", help="policy; beats the one in the configuration")
    parser.add_argument(
        "--kv-evict-config",
        metavar="FILE|JSON|PRESET",
        help="a YAML or JSON file, JSON text starting with '{', or a preset's name (default: the built-in defaults)",
    )
    parser.add_argument(
        "--kv-evict-budget", metavar="N", type=int, help="mean tokens kept per layer; beats budget.tokens"
    )
    parser.add_argument("--kv-evict-profile", metavar="FILE|auto|none", help="beats budget.profile")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--presets", action="store_true", help="list the presets instead")
    instead.add_argument("--policies", action="store_true", help="describe the policies, installed ones too, instead")
    instead.add_argument("--options", action="store_true", help="print docs/configuration.md, every option, instead")
    instead.add_argument("--support", action="store_true", help="print the support matrix instead")


def run(args: argparse.Namespace) -> int:
    """Print what was asked for and return the exit status.

    Raises
    ------
    ConfigError
        If the flags resolve to no legal configuration.
    """
    pages: dict[str, Callable[[], str]] = {
        "presets": list_presets,
        "policies": lambda: policies_page(policy_names()),
        "options": lambda: configuration_page(IN_TREE),
        "support": _support,
    }
    asked = next((name for name in pages if getattr(args, name)), None)
    flags = (args.kv_evict, args.kv_evict_config, args.kv_evict_budget, args.kv_evict_profile)
    any_flag = any(flag is not None for flag in flags)
    if args.what:
        if args.what[:1] != ["profile"] or len(args.what) != 2:
            more = " (lethe profiles compares two)" if len(args.what) > 2 else ""
            raise ConfigError(f"lethe show {' '.join(args.what)}: not known; write lethe show profile FILE{more}")
        if asked or any_flag:
            raise ConfigError("lethe show profile: takes no option; give one or the other")
        print(show_profile.render(load(Path(args.what[1])), Path(args.what[1]).name))
    elif asked is not None:
        if any_flag:
            raise ConfigError(f"--{asked}: takes no --kv-evict option; give one or the other")
        print(pages[asked]())
    elif args.kv_evict == "none":
        raise ConfigError("--kv-evict none: SGLang runs unpatched, so there is no configuration to show")
    else:
        print(render(resolve(*flags)))
    return 0


def _support() -> str:
    from lethe_sglang.engine.support import support_matrix  # the table that refuses is the one that is shown

    return support_matrix()


def render(config: EvictionConfig) -> str:
    """Write ``config`` as YAML, below comments that hold the values derived from it."""
    rule = config.built_policy.accumulation
    derived = (
        f"R = {config.recent} tokens of recent window (retain.recent_ratio x budget.tokens, rounded up)",
        f"K = {config.scored} tokens per layer besides it, on average, sinks included (budget.tokens - R)",
        *([f"gamma = {rule.decay:.6g} per decode step"] if rule is not None and 0 < rule.decay < 1 else []),
        f"a request may ask for {config.min_request_budget} to {config.max_request_budget} tokens",
    )
    body = write_yaml(config.model_dump(mode="json"), _WIDE)
    return "".join(f"# {line}\n" for line in derived) + body.rstrip("\n")


def list_presets() -> str:
    """Write one line per preset: its name and the first comment of its file."""
    found = presets()
    width = max((len(name) for name in found), default=0)
    return "\n".join(f"{name:<{width}}  {_first_comment(path)}" for name, path in found.items())


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ")
