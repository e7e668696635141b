"""``lethe gpu``: kernels, servers, host waits and replies measured on a GPU; needs no network."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe_bench.cli.checks import say
from lethe_bench.cli.options import check_out, integer
from lethe_bench.gpu.base import OUT, PORT
from lethe_bench.gpu.goal import Goal, Limit, measure
from lethe_bench.gpu.goals import GOALS, MODEL
from lethe_bench.gpu.models import MODELS
from lethe_bench.gpu.report import PARTS, report
from lethe_bench.gpu.results import Results, header
from lethe_bench.servers import port_free
from lethe_sglang.config import ConfigError
from lethe_sglang.files import write_atomically

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

LIMIT = 480
"""Seconds of a goal."""

_DESCRIPTION = """
lethe gpu kernels    each Triton kernel against its byte floor and a measured copy; attention beside them
lethe gpu bench      whole servers on dummy weights: stock, and lethe on each backend
lethe gpu trace      how often decode steps make the host wait, lethe's beside stock's
lethe gpu greedy     whether greedy replies of the bundled model depend on how they are served
lethe gpu report     the records of the other parts -> report.md
lethe gpu all        all of them, one after the other
lethe gpu goal NAME  one goal within a limit of time -> goal-NAME.json, with a verdict if all of it was measured:
                     {goals}

What has been measured is on disk after every record; after a kill or Ctrl-C the same command goes on from there, on
the same GPU and versions.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe gpu``."""
    parser = subparsers.add_parser(
        "gpu",
        description=_DESCRIPTION.format(goals=", ".join(GOALS)),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=(*PARTS, "report", "all", "goal"))
    parser.add_argument("goal", nargs="?", choices=tuple(GOALS), help="which one, behind goal")
    parser.add_argument("--dry-run", action="store_true", help="list what would run; needs no GPU")
    parser.add_argument(
        "--model", choices=tuple(MODELS), help="shapes of one model only, in kernels, bench and trace (trace: of one)"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=OUT, help="folder of the records and of report.md (%(default)s)"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument(
        "--limit",
        metavar="S",
        type=integer(60),
        help=f"seconds that a goal may take; no repeat is begun that would take longer (default: {LIMIT})",
    )


def run(args: argparse.Namespace) -> int:
    """Run what was asked for and return the exit status.

    Raises
    ------
    ConfigError
        If this machine lacks what a part needs, or its results are of another one.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _check(args)
    if args.part == "goal":
        return _goal(GOALS[args.goal], args)
    for name in (*PARTS, "report") if args.part == "all" else (args.part,):
        if args.dry_run:
            _list(name, args)
        elif name == "report":
            write_atomically(args.out / "report.md", report(args.out) + "\n")
            print(f"written to {args.out / 'report.md'}")
        else:
            need_gpu()
            about = header(name, list(PARTS[name].listing()), _words(name, args))
            PARTS[name].work(Results(args.out / f"{name}.jsonl", about, args.fresh), args.model)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what a part does not take."""
    if args.part != "goal":
        if args.goal is not None:
            raise ConfigError(f"{args.goal}: lethe gpu {args.part} takes no goal; use lethe gpu goal {args.goal}")
        if args.limit is not None:
            raise ConfigError(f"--limit {args.limit}: only lethe gpu goal has a limit; leave it out")
        return
    if args.goal is None:
        raise ConfigError(f"goal: give one of {', '.join(GOALS)}")
    if args.model not in (None, MODEL):
        raise ConfigError(f"--model {args.model}: the goals are {MODEL}'s; leave it out")
    if args.fresh:
        raise ConfigError("--fresh: a goal is always measured anew; leave it out")


def _goal(goal: Goal, args: argparse.Namespace) -> int:
    """Measure a goal and return 0 if it is met, 1 if it is missed or if there is no verdict."""
    limit = Limit(args.limit or LIMIT)
    if args.dry_run:
        print(*goal.listing(limit.seconds), sep="\n")
        return 0
    path = args.out / f"goal-{goal.name}.json"
    need_gpu()
    check_out(path)
    if not port_free(PORT):  # or a stranger's server would be the one that answers
        raise ConfigError(f"port {PORT} of 127.0.0.1 is in use, and the servers need it; end what listens there")
    words = ["goal", goal.name, *(["--limit", str(args.limit)] if args.limit else [])]
    about = header(f"goal {goal.name}", [f"repeat {number}" for number in range(1, goal.repeats + 1)], words)

    def keep(result: dict[str, Any]) -> None:
        write_atomically(path, json.dumps({**about, **result}, indent=1) + "\n")
        say(f"{path}: {len(result['samples'])} samples after {result['spent_s']:.0f} s")

    found = measure(goal, limit, keep)
    verdict = {True: "met", False: "missed", None: "no verdict"}[found["met"]]
    for name, number in found["judged"].items():
        print(f"{name}: {number['median']:.4g} ({number['smallest']:.4g} to {number['largest']:.4g})")
    print(*(f"missing: {line}" for line in found["missing"]), f"{goal.asks}: {verdict}", sep="\n")
    return 0 if found["met"] else 1


def need_gpu() -> None:
    """Refuse to measure without a CUDA device.

    Raises
    ------
    ConfigError
        If there is none.
    """
    import torch  # slow to import: only when something is measured

    if not torch.cuda.is_available():
        raise ConfigError("no CUDA device here; nothing was run. --dry-run lists what would run")


def _list(name: str, args: argparse.Namespace) -> None:
    """Print exactly what a part would run."""
    if name == "report":
        print("report: the records of the other parts -> report.md")
        return
    for key, line in PARTS[name].listing(args.model).items():
        print(f"{name} {key}: {line}")


def _words(name: str, args: argparse.Namespace) -> list[str]:
    return [name, *(["--model", args.model] if args.model else [])]
