"""Soak a server: ``python -m lethe_bench.soak``; ``scripts/soak.sh`` sets the environment up first."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from lethe_bench.cli.checks import say
from lethe_bench.machine import machine, versions
from lethe_bench.models import directory
from lethe_bench.servers import ServerError
from lethe_bench.soak.run import CONFIG, Soak
from lethe_bench.soak.traffic import CONTROL, REQUESTS, SWITCHES, waves
from lethe_bench.soak.verdict import GROWTH, to_json, to_markdown, verdict
from lethe_sglang.config import ConfigError
from lethe_sglang.files import write_atomically
from lethe_sglang.processes import ending_on_signals


def main(arguments: list[str] | None = None) -> int:
    """Soak, write and print the page; return 0 if all is well, 1 if not, 2 for a bad option, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--minutes", type=_positive, default=30.0, metavar="N", help="minutes of traffic (default 30)")
    add("--model-path", default="smollm2", metavar="MODEL", help="name or directory, as in lethe model (smollm2)")
    add("--stock-minutes", type=_positive, default=15.0, metavar="N", help="of a stock server afterwards (default 15)")
    add("--seed", type=int, default=0, metavar="N", help="of the traffic (default 0)")
    add("--growth", type=_positive, default=GROWTH, metavar="MIB", help="most growth an hour (default %(default)g)")
    add("--out", type=Path, default=Path("out/soak"), metavar="DIR", help="for soak.md, soak.json, logs (out/soak)")
    args = parser.parse_args(arguments)
    try:
        model = directory(args.model_path, say)
        args.out.mkdir(parents=True, exist_ok=True)
    except ConfigError as error:
        text = str(error).replace("--model ", "--model-path ")
        print(f"soak: error: {text}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"soak: error: --out {args.out}: {error.strerror}; give a directory that can be written", file=sys.stderr)
        return 2
    return soaked(args, Soak(model, args.out, say=say))


def soaked(args: argparse.Namespace, soak: Soak) -> int:
    """Soak, write and print the page and return the exit status."""
    found = soak.found
    status = 0
    try:
        with ending_on_signals():
            recorded = soak.record()
            soak.run(waves(args.seed, soak.tokens), 60 * args.minutes, recorded)
            write(args, soak)  # whatever becomes of the other server
            soak.beside(waves(args.seed, soak.tokens), 60 * args.stock_minutes, recorded)
    except ServerError as error:
        found.errors[f"{error}".splitlines()[0]] += 1
    except KeyboardInterrupt:
        found.interrupted, status = True, 130
    except SystemExit as end:
        found.interrupted, status = True, int(end.code or 0)
    page, passed = write(args, soak)
    print(page)
    return status or not passed


def write(args: argparse.Namespace, soak: Soak) -> tuple[str, bool]:
    """Write what was found so far; return the page and whether all is well."""
    found = soak.found
    wrong = verdict(found, args.growth, () if found.interrupted else (*REQUESTS, *CONTROL, *SWITCHES))
    about = {
        "command": f"`bash scripts/soak.sh --minutes {args.minutes:g} --stock-minutes {args.stock_minutes:g} "
        f"--seed {args.seed} --growth {args.growth:g}`",
        "model": args.model_path if "/" not in args.model_path else soak.model.resolve().name,
        "pool": soak.pool,
        "configuration": json.dumps(CONFIG),
        **{key: value for key, value in machine().items() if value},
        **versions(),
    }
    page = to_markdown(found, args.growth, wrong, about)
    write_atomically(args.out / "soak.json", json.dumps(to_json(found, args.growth, wrong, about), indent=1) + "\n")
    write_atomically(args.out / "soak.md", page)
    return page, not wrong


def _positive(text: str) -> float:
    """Convert a number above 0 for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not (0 < number < math.inf):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0, such as 30")
    return number


if __name__ == "__main__":
    sys.exit(main())
