"""Measure on a GPU, in parts that each fit a slot of 10 minutes; no network is needed.

bash scripts/gpu_suite.sh kernels            tests/kernels on the device
bash scripts/gpu_suite.sh micro              each Triton kernel against its byte floor and a measured copy; attention
bash scripts/gpu_suite.sh server             whole servers on dummy weights: stock, and lethe on each backend
bash scripts/gpu_suite.sh trace              whether lethe's decode steps make the host wait more often than stock's
bash scripts/gpu_suite.sh greedy             whether greedy replies of the bundled model depend on how they are served
bash scripts/gpu_suite.sh report             the JSON of the other parts -> report.md
bash scripts/gpu_suite.sh all                all six, one after the other

Every part takes --dry-run (list what would run; needs no GPU), --minutes, --model and --out. A part that runs out of
time or is killed keeps what it has measured; the same command goes on from there, on the same GPU and versions. Under
``all`` the minutes are those of each part.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_suite.base import Part, Scope
from gpu_suite.models import MODELS
from gpu_suite.report import PARTS, report
from gpu_suite.results import ROOT, Results, SuiteError, header, say


def need_gpu() -> None:
    """Raise :class:`SuiteError` without a CUDA device."""
    try:
        import torch

        found = torch.cuda.is_available()
    except ImportError as error:
        raise SuiteError(f"no PyTorch here ({error}); nothing was run. --dry-run lists what would run") from None
    if not found:
        raise SuiteError("no CUDA device here; nothing was run. --dry-run lists what would run")


def list_part(name: str, scope: Scope) -> None:
    """Print exactly what a part would run."""
    lines = PARTS[name].listing(scope) if name in PARTS else ["report: the JSON of the other parts -> report.md"]
    for line in lines:
        print(line)


def write_report(folder: Path) -> None:
    """Write the page beside the JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(report(folder) + "\n", encoding="utf-8")


def run_part(part: Part, scope: Scope, options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Run one part until it is done or its time is over.

    Raises
    ------
    SuiteError
        If this machine lacks what it needs, or its results are of another one.
    """
    need_gpu()
    if part.needs_sglang and importlib.util.find_spec("sglang") is None:
        raise SuiteError("SGLang is not installed here; unpack a bundle made with --with-sglang")
    deadline = time.monotonic() + options.minutes * 60
    for job in part.jobs(scope):
        name = f"{part.name}-{job.model}" if job.model else part.name
        results = Results(
            options.out / f"{name}.json", header(part.name, job.model, arguments), job.keys, options.fresh
        )
        job.work(results, deadline)
        if left := results.todo():
            say(f"{name}: {len(left)} of {len(job.keys)} records are left; the same command goes on")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="gpu_suite.sh",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=(*PARTS, "report", "all"))
    parser.add_argument("--dry-run", action="store_true", help="list what would run")
    parser.add_argument(
        "--model", choices=tuple(MODELS), help="one model of micro, server and trace (default: both; trace: the first)"
    )
    parser.add_argument("--minutes", type=float, default=9, help="longest run of a part (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each server run (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "results" / "gpu", help="folder of the JSON and of report.md"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    options = parser.parse_args(arguments)
    models = (options.model,) if options.model else tuple(MODELS)
    folder = Path("out", "gpu-suite") if options.dry_run else ROOT / "out" / "gpu-suite"
    scope = Scope(models, options.repeats, folder)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        for name in (*PARTS, "report") if options.part == "all" else (options.part,):
            if options.dry_run:
                list_part(name, scope)
            elif name == "report":
                write_report(options.out)
            else:
                run_part(PARTS[name], scope, options, arguments)
    except SuiteError as error:
        print(f"gpu_suite: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
