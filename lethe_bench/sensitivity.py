"""Which statistic of a profile predicts what a layer loses when it alone is pruned? Prints a Markdown table.

python -m lethe_bench.sensitivity out/eval/sensitivity/replies.csv docs/results/allocation/profile.yaml
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

from lethe_bench.cli.profiles import rank_correlation
from lethe_sglang.allocation.profile import load


def main() -> None:
    """Read replies of arms ``full`` and ``layer-N`` and a profile; print losses and rank correlations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("replies", type=Path, help="replies.csv of configs/eval/sensitivity.yaml")
    parser.add_argument("profile", type=Path, help="profile of the same model")
    options = parser.parse_args()
    right = defaultdict(list)
    with options.replies.open() as lines:
        for row in csv.DictReader(lines):
            right[row["arm"]].append(row["ok"] == "1")
    full = sum(right["full"]) / len(right["full"])
    layers = sorted((arm for arm in right if arm.startswith("layer-")), key=lambda arm: int(arm.split("-")[1]))
    loss = [100 * (full - sum(right[arm]) / len(right[arm])) for arm in layers]
    print("| statistic | " + " | ".join(layers) + " | rank correlation with the loss |")
    print("| --- |" + " ---: |" * (len(layers) + 1))
    print("| loss, points | " + " | ".join(f"{value:.0f}" for value in loss) + " | |")
    for name, values in load(options.profile).statistics.items():
        cells = " | ".join(f"{value:.3g}" for value in values.mean)
        print(f"| `{name}` | {cells} | {rank_correlation(values.mean, loss):+.2f} |")


if __name__ == "__main__":
    main()
