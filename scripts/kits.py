"""Run the test kits that SGLang ships against stock SGLang and against a server that evicts; write a page of both.

python scripts/kits.py [KIT ...] [--arm ARM] [--model MODEL]     all kits and both arms, unless some are named

A kit is a mixin of ``sglang.test.kits`` with test methods; SGLang's own tests mix it into a class that has started a
server. Here every method runs once per arm, on a server that all kits of one model share. What was found stays in
``docs/results/kits/kits.json``: a run of some kits replaces theirs and leaves the others.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from lethe_bench import machine, models
from lethe_bench.kits.page import page
from lethe_bench.kits.run import Outcome, run, say
from lethe_bench.kits.table import ARMS, ENVIRONMENT, KITS
from lethe_bench.servers import Server, launch_command, some_free_port
from lethe_sglang.files import write_atomically
from lethe_sglang.processes import ending_on_signals

ROOT = Path(__file__).parents[1]
FOUND = ROOT / "docs" / "results" / "kits" / "kits.json"
PAGE = ROOT / "docs" / "results" / "kits.md"


def main() -> None:
    """Run the kits that were named against the arms that were named, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("kits", nargs="*", metavar="KIT", help=f"of {', '.join(KITS)} (default: all)")
    parser.add_argument("--arm", choices=ARMS, help="one arm only")
    parser.add_argument("--model", help=f"{models.LEGAL} (default: each kit's own, which the page names)")
    parser.add_argument("--page", action="store_true", help="write the page of what was found before, run nothing")
    options = parser.parse_args()
    if unknown := sorted(set(options.kits) - set(KITS)):
        parser.error(f"KIT {unknown[0]}: not a kit; legal: {', '.join(KITS)}")
    groups: dict[str, list[str]] = {}
    for name in [] if options.page else options.kits or KITS:
        groups.setdefault(options.model or KITS[name].model, []).append(name)
    with ending_on_signals():
        for model, names in groups.items():
            for arm in [options.arm] if options.arm else ARMS:
                measure(arm, model, names)
    write({})


def measure(arm: str, model: str, names: list[str]) -> None:
    """Start the server of an arm, run kits of one model and write the page after each test."""
    directory, port = models.directory(str(ROOT / model) if (ROOT / model).is_dir() else model), some_free_port()
    log = Path(tempfile.gettempdir(), f"kits-{arm}-{directory.name}.log")
    outcomes: dict[str, dict[str, Outcome]] = {name: {} for name in names}

    def keep(name: str, test: str, outcome: Outcome) -> None:
        say(f"  {name} {test}: {outcome}")
        outcomes[name][test] = outcome
        write({name: {"model": model, arm: done} for name, done in outcomes.items() if done})

    with Server(launch_command(str(directory), port, *ARMS[arm]), port, log, ENVIRONMENT) as server:
        say(f"{arm} of {model}: ready after {server.ready_seconds:.0f} s, log {log}")
        run(names, server, str(directory), keep)


def write(new: dict[str, dict[str, Any]]) -> None:
    """Write what was found, by kit, into what was found before and into the page; another model replaces a kit's."""
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {"kits": {}}
    for name, kit in new.items():
        before = found["kits"].get(name, {})
        found["kits"][name] = {**before, **kit} if before.get("model") == kit["model"] else kit
    if new:
        found |= {"machine": machine.machine(), "versions": machine.versions()}
    FOUND.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(FOUND, json.dumps(found, indent=1) + "\n")
    write_atomically(PAGE, page(found))


if __name__ == "__main__":
    main()
