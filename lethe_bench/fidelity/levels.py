"""What policies lose at several budgets: a table and a picture of what ``lethe eval fidelity`` has written."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lethe_bench.accuracy.plots import available
from lethe_bench.fidelity import plots
from lethe_sglang.config import ConfigError


class Level(NamedTuple):
    """All arms at one budget.

    Attributes
    ----------
    share
        Part of the own tokens that is kept.
    arms
        Name -> KL (nats a step, mean over the corpora) and NLL of values above full (nats a token).
    """

    share: float
    arms: dict[str, tuple[float, float]]


def read(path: Path, corpora: Sequence[str]) -> Level:
    """Read one ``fidelity.json``.

    Raises
    ------
    ConfigError
        If it is none, or has other corpora and no numbers of each.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        share = found["base"]["budget"]["tokens"] / found["tokens"]
        whole = list(found["corpora"]) == list(corpora)
        arms = {name: (_mean(arm, None if whole else corpora), _values(arm)) for name, arm in found["arms"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: no numbers of {', '.join(corpora)} there ({type(error).__name__}: {error}); "
            "give a fidelity.json of lethe eval fidelity that has these corpora and base.budget.tokens"
        ) from None
    return Level(share, arms)


def _mean(arm: dict[str, Any], corpora: Sequence[str] | None) -> float:
    if corpora is None:
        return float(arm["kl"]["mean"])
    return sum(float(arm["corpora"][corpus]["kl"]["mean"]) for corpus in corpora) / len(corpora)


def _values(arm: dict[str, Any]) -> float:
    return float((arm["corpora"]["recall"] if "corpora" in arm else arm)["recall"]["mean"])


def table(levels: Sequence[Level]) -> str:
    """Return Markdown: an arm a row, best first at the smallest budget, of the arms that all levels have."""
    ordered = sorted(levels)
    arms = set.intersection(*(set(level.arms) for level in ordered))
    head = [f"{measure} at {level.share:.3g}" for measure in ("KL", "values") for level in ordered]
    lines = [f"| arm | {' | '.join(head)} |", "| --- " * (len(head) + 1) + "|"]
    for arm in sorted(arms, key=lambda arm: sum(ordered[0].arms[arm])):
        numbers = [level.arms[arm][measure] for measure in (0, 1) for level in ordered]
        lines.append(f"| {arm} | {' | '.join(f'{number:.3f}' for number in numbers)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and draw the picture; the exit status is 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m lethe_bench.fidelity.levels", description=__doc__)
    parser.add_argument("picture", type=Path, metavar="PICTURE.svg")
    parser.add_argument("corpora", metavar="own,prose,recall", help="corpora that all files have, and recall is one of")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help="fidelity.json, a file a budget")
    args = parser.parse_args(arguments)
    try:
        levels = sorted(read(file, args.corpora.split(",")) for file in args.files)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(levels))
    if available():
        plots.against_share(args.picture, [(level.share, level.arms) for level in levels])
    else:
        print("no picture: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
