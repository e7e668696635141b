"""Fidelity against load: the same documents, ever more of them at once on one pool.

Under pressure, what a request loses depends on what runs beside it. So documents are forced in groups of as many as the
load says, all of a group sent together to a server that has nothing else to do and an empty prefix cache. A last group
that would be smaller is filled up with the first documents, which are then measured twice; the last time counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lethe_bench.accuracy.plots import available
from lethe_bench.fidelity import plots
from lethe_bench.fidelity.report import Results, against, summary
from lethe_bench.statistics import Mean
from lethe_sglang.files import Journal

if TYPE_CHECKING:
    from lethe_bench.fidelity.run import Experiment

JOURNAL = "loads.jsonl"
"""Of a results directory: what the server held while a group was forced."""

T = TypeVar("T")


def folder_of(arm: str, load: int) -> str:
    """Return the name of the folder of an arm under a load."""
    return f"{arm}@{load}"


def groups(documents: Sequence[T], load: int) -> list[list[T]]:
    """Return the documents in groups of ``load``, at most as many as there are; the first ones fill up the last."""
    return [[documents[(start + n) % len(documents)] for n in range(load)] for start in range(0, len(documents), load)]


def of_load(results: Results, experiment: Experiment, load: int) -> Results:
    """Return what a load alone would have left: its arms, by their own names."""
    arms = {arm: results.arms.get(folder_of(arm, load), {}) for arm in experiment.arms}
    return results._replace(arms={arm: steps for arm, steps in arms.items() if steps})


def section(out: Path, results: Results, experiment: Experiment, reference: str, skip: int) -> list[str]:
    """Return the curves of a results directory in Markdown: a picture, a table by load, and arms paired at each load.

    Parameters
    ----------
    out
        The directory, which gets the picture.
    reference
        The arm that others are paired with, at the same load.
    skip
        Steps at the beginning of each reply that are not counted.
    """
    by_load = {load: of_load(results, experiment, load) for load in experiment.loads}
    by_load = {load: found for load, found in by_load.items() if reference in found.arms}
    means = {load: summary(found, skip) for load, found in by_load.items()}
    found = ["## Against load", f"A pool of {experiment.pool_tokens} tokens; all documents of a group at once."]
    if means and available():
        plots.against_load(out / "load.svg", means)
        found.append("![KL and what recall loses against documents at once](load.svg)")
    found.append(_table(out, means))
    for load, some in by_load.items():
        found += [f"{load} at once:", against(some, reference, skip)]
    return found


def _table(out: Path, means: Mapping[int, Mapping[str, Mapping[str, Mean]]]) -> str:
    last = {(line["arm"], line["load"], line["group"]): line for line in Journal(out / JOURNAL).read()}
    titles = ("documents at once", "arm", "KL of all corpora (nats)", "NLL of values above full")
    head = (*titles, "requests running, mean", "KV tokens held, peak", "requests retracted")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for load, arms in means.items():
        for arm, measures in arms.items():
            cells = [_interval(measures[name]) if name in measures else "" for name in ("kl", "recall")]
            held = [line for (of, at, _), line in last.items() if (of, at) == (arm, load)]
            steps = sum(line["decode_steps"] for line in held)
            if held:
                cells.append(f"{sum(line['running_mean'] * line['decode_steps'] for line in held) / steps:.1f}")
                cells.append(str(max(line["tokens_peak"] for line in held)))
                cells.append(str(sum(line["retracted_requests"] for line in held)))
            lines.append(f"| {load} | {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(mean: Mean) -> str:
    return f"{mean.mean:.4f} ({mean.low:.4f} to {mean.high:.4f})"
