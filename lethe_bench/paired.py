"""Compare the arms of experiments with one of them on the same problems; prints a Markdown table.

python -m lethe_bench.paired out/eval/allocation/replies.csv out/eval/allocation-37/replies.csv
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

from lethe_bench.statistics import paired


def main() -> None:
    """Read replies, one reply a problem and arm; one row an arm, two columns a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("replies", type=Path, nargs="+", help="replies.csv of experiments with arms of the same names")
    parser.add_argument("--against", default="uniform", help="arm to compare with (default: %(default)s)")
    options = parser.parse_args()
    right: list[dict[str, dict[str, bool]]] = []
    for file in options.replies:
        arms: dict[str, dict[str, bool]] = defaultdict(dict)
        with file.open() as lines:
            for row in csv.DictReader(lines):
                arms[row["arm"]][row["problem"]] = row["ok"] == "1"
        right.append(arms)
    print("| arm |" + f" right, % | against `{options.against}` |" * len(right))
    print("| --- |" + " ---: | --- |" * len(right))
    for arm in dict.fromkeys(name for arms in right for name in arms):
        print(f"| `{arm}` | " + " | ".join(_cells(arms, arm, options.against) for arms in right) + " |")


def _cells(arms: dict[str, dict[str, bool]], arm: str, base: str) -> str:
    if arm not in arms:
        return "- | -"
    mine, theirs = arms[arm], arms[base]
    share = f"{100 * sum(mine.values()) / len(mine):.1f}"
    if arm == base:
        return f"{share} | -"
    found = paired(list(mine.values()), [theirs[problem] for problem in mine])
    p = "p < 0.001" if found.p < 0.001 else f"p {found.p:.3f}"
    interval = f"{100 * found.gain:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"{share} | {interval}, {p}, {found.wins}:{found.losses}"


if __name__ == "__main__":
    main()
