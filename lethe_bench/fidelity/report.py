"""Tables of a results directory of ``lethe eval fidelity``: means with intervals over documents, arms paired."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lethe_bench.accuracy.plots import available
from lethe_bench.fidelity import trajectory
from lethe_bench.statistics import Mean, pooled_mean, total_mean
from lethe_sglang.config import ConfigError
from lethe_sglang.config.policy_section import laid_over
from lethe_sglang.files import Journal, write_atomically

if TYPE_CHECKING:
    from lethe_bench.fidelity.run import Experiment

ROUNDS = "rounds.jsonl"
"""Of a results directory: which steps of a document are the first behind a round of an arm, where that is known."""

KL, AGREEMENT, NLL, FULL_NLL = range(4)
"""Columns of a document's steps, float32 ``[T, 4]`` (``processor.MEASURES``)."""

Steps = NDArray[np.float32]


class Measure(NamedTuple):
    """One column of a table: a number a document, of whose steps it is computed, and how it is printed."""

    title: str
    of: Callable[[Steps], float]
    form: str = ".3f"


MEASURES = (
    Measure("KL (nats)", lambda steps: float(steps[:, KL].mean())),
    Measure("KL below which 99 % of steps are", lambda steps: float(np.quantile(steps[:, KL], 0.99)), ".2f"),
    Measure("same first choice", lambda steps: float(steps[:, AGREEMENT].mean())),
    Measure("NLL above full", lambda steps: float((steps[:, NLL] - steps[:, FULL_NLL]).mean())),
)
RECALL = (
    Measure("NLL of values above full", lambda steps: float((steps[:, NLL] - steps[:, FULL_NLL]).mean())),
    Measure("NLL with the full cache", lambda steps: float(steps[:, FULL_NLL].mean())),
)
"""Of the steps alone that are tokens of a value."""


class Results(NamedTuple):
    """What a results directory holds: the experiment, documents' steps by arm, and which of them are values."""

    experiment: dict[str, Any]
    arms: dict[str, dict[str, Steps]]
    values: dict[str, list[int]]

    def numbers(self, measure: Measure, arm: str, names: list[str], skip: int) -> list[float]:
        """Return a measure of an arm's documents, their first ``skip`` steps left out."""
        chosen = (self.arms[arm][name] for name in names)
        if measure in RECALL:
            return [measure.of(steps[self.values[name]]) for name, steps in zip(names, chosen, strict=True)]
        return [measure.of(steps[skip:]) for steps in chosen]

    def recalled(self) -> list[str]:
        """Return the corpora whose documents have values that are asked for."""
        corpora = list(self.experiment["corpora"])
        return [c for c in corpora if any(self.values[name] for name in self.values if name.startswith(f"{c}-"))]

    def names(self, corpus: str, *arms: str) -> list[str]:
        """Return the documents of a corpus that all of these arms have."""
        common = set.intersection(*(set(self.arms[arm]) for arm in arms))
        return sorted(name for name in common if name.startswith(f"{corpus}-"))


def read(out: Path) -> Results:
    """Read a results directory.

    Raises
    ------
    ConfigError
        If it holds no results.
    """
    kept = Journal(out / "experiment.json").read()
    if not kept:
        raise ConfigError(f"{out}: no results there; give a directory made by lethe eval fidelity")
    lines = Journal(out / "documents.jsonl").read()
    values = {line["name"]: [n for start, end, _ in line["values"] for n in range(start, end)] for line in lines}
    arms = {
        folder.name: {path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))}
        for folder in sorted(out.iterdir())
        if folder.is_dir() and folder.name != "full"
    }
    return Results(kept[0], arms, values)


def table(results: Results, skip: int = 0) -> str:
    """Return Markdown: a table a corpus, a row an arm, means with 95 % intervals over documents."""
    parts = []
    for corpus in results.experiment["corpora"]:
        columns = (*MEASURES, *(RECALL if corpus in results.recalled() else ()))
        rows = []
        for arm in results.arms:
            if names := results.names(corpus, arm):
                cells = [_cell(measure, results.numbers(measure, arm, names, skip)) for measure in columns]
                rows.append(f"| {arm} | {len(names)} | {' | '.join(cells)} |")
        head = f"| arm | documents | {' | '.join(measure.title for measure in columns)} |"
        parts.append("\n".join((f"### {corpus}", "", head, "| --- " * (len(columns) + 2) + "|", *rows)))
    return "\n\n".join(parts)


def _cell(measure: Measure, numbers: list[float]) -> str:
    mean, low, high = (format(value, measure.form) for value in pooled_mean([numbers]))
    return f"{mean} ({low} to {high})"


def against(results: Results, reference: str, skip: int = 0) -> str:
    """Return Markdown: every arm less a reference, document by document, with 95 % intervals.

    Of several corpora each has its own column, too. The sum is that of both means: documents of all corpora are drawn
    for the one, those that have values for the other.

    Raises
    ------
    ConfigError
        If there is no such arm.
    """
    if reference not in results.arms:
        raise ConfigError(f"--against {reference}: no such arm; give one of {', '.join(results.arms)}")
    corpora = list(results.experiment["corpora"])
    alone = corpora if len(corpora) > 1 else []
    titles = [f"less {reference}", "KL of all corpora (nats)", "NLL of values above full", "sum"]
    titles += [f"KL, {corpus}" for corpus in alone]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]

    def differences(measure: Measure, arm: str, corpora: Sequence[str]) -> list[list[float]]:
        """Return those of the documents of each corpus that has any."""
        found = []
        for corpus in corpora:
            names = results.names(corpus, arm, reference)
            first, second = (np.array(results.numbers(measure, which, names, skip)) for which in (arm, reference))
            found += [(first - second).tolist()] * bool(names)
        return found

    for arm in results.arms:
        kl = differences(MEASURES[0], arm, corpora)
        values = differences(RECALL[0], arm, results.recalled())
        several = [[kl], [values], [kl, values], *([differences(MEASURES[0], arm, [corpus])] for corpus in alone)]
        cells = [_signed(total_mean(parts)) if all(parts) else "" for parts in several]
        lines += [f"| {arm} | {' | '.join(cells)} |"] * (arm != reference)
    return "\n".join(lines)


def _signed(found: Mean) -> str:
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def summary(results: Results, skip: int = 0) -> dict[str, dict[str, Mean]]:
    """Return each arm's KL over all corpora and, if there is one of recall, its NLL of values above full."""
    found = dict[str, dict[str, Mean]]()
    for arm in results.arms:
        names = {corpus: results.names(corpus, arm) for corpus in results.experiment["corpora"]}
        strata = [results.numbers(MEASURES[0], arm, some, skip) for some in names.values() if some]
        if strata:
            found[arm] = {"kl": pooled_mean(strata)}
            if asked := [results.numbers(RECALL[0], arm, names[c], skip) for c in results.recalled() if names[c]]:
                found[arm]["recall"] = pooled_mean(asked)
    return found


def _plain(means: dict[str, Mean]) -> dict[str, Any]:
    return {name: mean._asdict() for name, mean in means.items()}


def draw(out: Path, results: Results, found: dict[str, dict[str, Mean]]) -> list[str]:
    """Draw the pictures into the directory, if matplotlib is there; returns their Markdown."""
    if not available():
        return []
    from lethe_bench.fidelity import plots

    pictures = []
    if both := {arm: (means["kl"], means["recall"]) for arm, means in found.items() if "recall" in means}:
        plots.tradeoff(out / "tradeoff.svg", both)
        pictures.append("![KL and what recall loses, an arm a point](tradeoff.svg)")
    known = {(line["arm"], line["name"]): line["rounds"] for line in Journal(out / ROUNDS).read()}
    position, distance = {}, {}
    for arm, documents in results.arms.items():
        if documents:
            position[arm] = plots.by_position([steps[:, KL] for steps in documents.values()])
        if some := [name for name in documents if (arm, name) in known]:
            distance[arm] = plots.by_distance([documents[n][:, KL] for n in some], [known[arm, n] for n in some])
    panels = {"token of the reply": position, "steps since the last round": distance}
    plots.curves(out / "curves.svg", {title: lines for title, lines in panels.items() if lines})
    return [*pictures, "![KL along a reply and since the last round](curves.svg)"]


def write(out: Path, reference: str, experiment: Experiment) -> Path:
    """Write ``fidelity.md``, ``fidelity.json`` and pictures; returns the first.

    Steps before the first round any arm may have are not counted.
    """
    from lethe_bench.fidelity import loads  # which reads its tables from here

    skip = max(config.budget.tokens for config in experiment.configs().values())
    results = read(out)
    found = summary(results, skip)
    numbers = {**results.experiment, "skip": skip, "arms": {arm: _plain(means) for arm, means in found.items()}}
    for corpus, count in results.experiment["corpora"].items():
        alone = results._replace(experiment={"corpora": {corpus: count}})
        for arm, means in summary(alone, skip).items():
            documents = {"documents": len(results.names(corpus, arm))}
            numbers["arms"][arm].setdefault("corpora", {})[corpus] = {**documents, **_plain(means)}
    write_atomically(out / "fidelity.json", json.dumps(numbers, indent=1))
    settings = ", ".join(f"{name} {value}" for name, value in results.experiment.items() if name != "base")
    one_table = bool(results.experiment["corpora"]) and not experiment.loads  # not own trajectories alone
    parts = (
        f"# Fidelity to the full cache: {experiment.name}",
        f"Settings: {settings}. Steps from {skip} on; means over documents with 95 % bootstrap intervals.",
        "\n".join(
            f"- {arm}: `{json.dumps(laid_over(experiment.base, options))}`" for arm, options in experiment.arms.items()
        ),
        *(loads.section(out, results, experiment, reference, skip) if experiment.loads else ()),
        *(draw(out, results, found) if one_table else ()),
        table(results, skip),
        *(("## Paired", against(results, reference, skip)) if one_table else ()),
        trajectory.section(out, reference, list(experiment.arms), skip),
    )
    path = out / "fidelity.md"
    write_atomically(path, "\n\n".join(filter(None, parts)) + "\n")
    return path
