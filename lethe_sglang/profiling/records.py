"""What prompts have left behind: kept on disk while a pass runs, and made into statistics at its end."""

from __future__ import annotations

import statistics as stats
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lethe_sglang.allocation.profile import PER_PROMPT, PER_QUERY, Statistic
from lethe_sglang.files import Journal

Record = dict[str, Any]
"""One prompt's report, see ``Measurer.reports``; ``rid`` is the prompt's number as text."""


class Partial(Journal):
    """Finished prompts of a pass that may be interrupted.

    Parameters
    ----------
    profile
        Where the pass writes its profile; the file lies next to it.
    key
        Identifies model, prompts and settings; a file of another pass is not read.
    """

    def __init__(self, profile: Path, key: str) -> None:
        super().__init__(profile.with_name(f"{profile.name}.partial"), {"pass": key})
        self.profile = profile

    def load(self) -> dict[str, Record]:
        """Return the finished prompts by number; a file that cannot be read has none."""
        try:
            return {record["rid"]: record for record in self.read()}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def longest(reports: Sequence[Record]) -> list[Record]:
    """Keep one report a prompt: a retracted request leaves one for each time it ran."""
    best: dict[str, Record] = {}
    for report in reports:
        if report["queries"] > best.get(report["rid"], {"queries": 0})["queries"]:
            best[report["rid"]] = report
    return list(best.values())


def summarise(records: Sequence[Record]) -> dict[str, Statistic]:
    """Make the statistics of a profile from the records of its prompts (at least one).

    A prompt's value is the mean over its decode queries; ``mean`` and ``spread`` are over prompts, which count alike.
    """
    layers = range(len(records[0]["per_prompt"]))
    out: dict[str, Statistic] = {}
    for s, name in enumerate(PER_QUERY):
        per_prompt = [
            [sum(part["sums"][layer][s] for part in r["by_length"].values()) / r["queries"] for layer in layers]
            for r in records
        ]
        out[name] = _statistic(per_prompt, _by_length(records, s))
    for s, name in enumerate(PER_PROMPT):
        out[name] = _statistic([[r["per_prompt"][layer][s] for layer in layers] for r in records], {})
    return out


def _by_length(records: Sequence[Record], s: int) -> dict[int, tuple[float, ...]]:
    parts: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        for length, part in record["by_length"].items():
            parts[int(length)].append(part)
    out = {}
    for length, found in sorted(parts.items()):
        queries = sum(part["queries"] for part in found)
        sums = (sum(layer) for layer in zip(*([row[s] for row in part["sums"]] for part in found), strict=True))
        out[length] = tuple(total / queries for total in sums)
    return out


def _statistic(per_prompt: list[list[float]], by_length: dict[int, tuple[float, ...]]) -> Statistic:
    columns = list(zip(*per_prompt, strict=True))
    return Statistic(
        mean=tuple(stats.fmean(column) for column in columns),
        spread=tuple(stats.pstdev(column) for column in columns),
        by_length=by_length,
    )
