"""``lethe gpu``: kernels, servers, host waits and replies measured on a GPU; needs no network."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lethe_bench.gpu.base import OUT
from lethe_bench.gpu.models import MODELS
from lethe_bench.gpu.report import PARTS, report
from lethe_bench.gpu.results import Results, header
from lethe_sglang.config import ConfigError
from lethe_sglang.files import write_atomically

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """
lethe gpu kernels    each Triton kernel against its byte floor and a measured copy; attention beside them
lethe gpu bench      whole servers on dummy weights: stock, and lethe on each backend
lethe gpu trace      how often decode steps make the host wait, lethe's beside stock's
lethe gpu greedy     whether greedy replies of the bundled model depend on how they are served
lethe gpu report     the records of the other parts -> report.md
lethe gpu all        all of them, one after the other

What has been measured is on disk after every record; after a kill or Ctrl-C the same command goes on from there, on
the same GPU and versions.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe gpu``."""
    parser = subparsers.add_parser(
        "gpu", description=_DESCRIPTION, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=(*PARTS, "report", "all"))
    parser.add_argument("--dry-run", action="store_true", help="list what would run; needs no GPU")
    parser.add_argument(
        "--model", choices=tuple(MODELS), help="shapes of one model only, in kernels, bench and trace (trace: of one)"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=OUT, help="folder of the records and of report.md (%(default)s)"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")


def run(args: argparse.Namespace) -> int:
    """Run what was asked for and return the exit status.

    Raises
    ------
    ConfigError
        If this machine lacks what a part needs, or its results are of another one.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
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
