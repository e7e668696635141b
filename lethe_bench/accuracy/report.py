"""What an experiment's replies say: accuracies with intervals, paired tests, memory, and the Markdown page."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lethe_bench.accuracy import plots
from lethe_bench.accuracy.experiment import FULL
from lethe_bench.accuracy.plots import Picture, Point
from lethe_bench.accuracy.results import RANDOM, Replies, Results, alike
from lethe_bench.statistics import Mean, Paired
from lethe_sglang.files import write_atomically

OURS = "lethe"

_ALL = "all tasks"
_NONE = "-"


def write(directory: Path) -> str:
    """Write ``report.md``, its pictures and ``replies.csv`` into a results directory, and return the page.

    Raises
    ------
    ConfigError
        If the directory holds no results.
    """
    results = Results.read(directory)
    pictures = draw(results, directory) if results.replies and plots.available() else []
    page = to_markdown(results, pictures)
    write_atomically(directory / "report.md", page + "\n")
    write_replies(results, directory / "replies.csv")
    return page


def write_replies(results: Results, path: Path) -> None:
    """Write one line per reply without its text, from which every number of the page follows."""
    file = io.StringIO(newline="")
    table = csv.writer(file, lineterminator="\n")
    table.writerow(
        ["arm", "problem", "sample", "ok", "tokens", "finish", "rounds", "evicted", "steps", "held", "stock"]
    )
    for name, replies in results.replies.items():
        for (problem, sample), line in sorted(replies.lines.items()):
            m = line["memory"]
            table.writerow(
                [
                    name,
                    problem,
                    sample,
                    int(line["ok"]),
                    line["tokens"],
                    line["finish"],
                    m["rounds"],
                    sum(m["evicted_per_layer"]),
                    m["steps"],
                    round(m["own_held_mean"], 2),
                    round(m["own_stock_mean"], 2),
                ]
            )
    write_atomically(path, file.getvalue())


def draw(results: Results, directory: Path) -> list[Picture]:
    """Draw what there is data for."""
    panels: dict[str, dict[str, list[Point]]] = {}
    full = {}
    for title in [_ALL, *results.tasks] if len(results.tasks) > 1 else results.tasks:
        for name, replies in results.replies.items():
            part = replies if title == _ALL else replies.of(title)
            if not part.lines:
                continue
            point = Point(part.memory, *part.accuracy())
            if replies.arm.index is None:
                full[title] = point
            else:
                panels.setdefault(title, {}).setdefault(name.partition("@")[0], []).append(point)
    pictures = [plots.plot_accuracy(directory / "accuracy.png", panels, full)] if panels else []
    budgets: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for trace in results.traces:
        traced = results.replies.get(trace["arm"])
        if traced is not None and traced.arm.config is not None and trace["rounds"]:
            budget = f"{traced.arm.config.budget.tokens} tokens"
            budgets.setdefault(budget, {}).setdefault(trace["arm"], []).append(trace)
    if budgets:
        layers = {
            title: {arm.partition("@")[0]: plots.kept_per_layer(found) for arm, found in arms.items()}
            for title, arms in budgets.items()
        }
        pictures.append(plots.plot_layers(directory / "layers.png", layers))
    for title, arms in budgets.items():
        first = {arm: found[0]["rounds"] for arm, found in arms.items()}
        pictures.append(plots.plot_kept(directory / f"kept-{title.partition(' ')[0]}.png", first))
    return pictures


# -- the page ----------------------------------------------------------------------------------------------------------


def to_markdown(results: Results, pictures: Sequence[Picture]) -> str:
    """Write the page: what was run and where, one table over all tasks, one per task, the pictures."""
    lines = [f"# Accuracy against memory: {results.experiment.name}", "", *_about(results)]
    if not results.replies:
        return "\n".join([*lines, "No reply yet."])
    if unfinished := _unfinished(results):
        lines += [f"**Unfinished**: {', '.join(unfinished)}. Compare arms only by their paired differences.", ""]
    lines += [f"## {_ALL.capitalize()}", "", *_table(results, results.replies, speed=True), "", *_legend(results), ""]
    if duels := _duels(results):
        lines += [f"## {OURS} against each policy of its budget", "", *duels, ""]
    if len(results.tasks) > 1:
        for task in results.tasks:
            parts = {name: part for name, replies in results.replies.items() if (part := replies.of(task)).lines}
            lines += [f"## {task.capitalize()}", "", *_table(results, parts, speed=False), ""]
    if not plots.available():
        lines += ["No pictures: matplotlib is not installed (`pip install 'lethe-sglang[bench]'`).", ""]
    for picture in pictures:
        lines += [f"![{picture.caption}]({picture.file})", "", picture.caption, ""]
    return "\n".join(lines).rstrip()


def _about(results: Results) -> Iterator[str]:
    experiment, last = results.experiment, results.runs[-1]
    model = experiment.readable([experiment.model_path])[0]
    alike: dict[str, list[str]] = {}
    for task in experiment.tasks:
        count = "all" if task.problems is None else str(task.problems)
        length = (
            f" (reference chains of {task.tokens[0]} to {task.tokens[1]} tokens)" if task.family is not None else ""
        )
        limit, samples = experiment.limit_of(task), experiment.samples_of(task)
        bound = f"{limit} the reference reply" if isinstance(limit, str) else f"{limit} tokens"
        replies = "one reply each" if samples == 1 else f"{samples} replies each"
        alike.setdefault(f"{count} of %s{length}, {replies} of at most {bound}", []).append(task.label)
    tasks = [text % ", ".join(labels) for text, labels in alike.items()]
    sampling = experiment.sampling
    drawn = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
    yield f"Model {model}, {drawn}, {experiment.concurrency} requests at a time. Problems: {'; '.join(tasks)}."
    if any(task.family is not None for task in experiment.tasks):
        yield f"Generated problems are those of split `{experiment.split}`; a reply is right if its answer is, exactly."
    if any(task.dataset is not None for task in experiment.tasks):
        yield f"Boxed answers were marked by {last['verifier']}."
    yield ""
    for run in results.runs:
        machine = run["machine"]
        hardware = ", ".join([*machine["gpus"], machine["cpu"]])
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        yield f"{run['started']}, {hardware}, {machine['cores']} cores, {machine['memory_gib']:g} GiB; {versions}:"
        yield from ("", f"    {run['command']}", "")
        for kind, facts in run["servers"].items():
            settings = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "command")
            yield from (f"- {kind} server: `{' '.join(facts['command'])}` ({settings})",)
        yield ""


def _unfinished(results: Results) -> list[str]:
    """Say which arms lack replies: against the problems asked for, or the longest arm where a file decides."""
    known = [
        None if task.problems is None else task.problems * results.experiment.samples_of(task)
        for task in results.experiment.tasks
    ]
    most = max(len(replies.lines) for replies in results.replies.values())
    wanted = most if None in known else sum(count for count in known if count is not None)
    counts = {
        arm.name: len(results.replies[arm.name].lines) if arm.name in results.replies else 0
        for arm in results.experiment.every_arm()
    }
    return [f"{name} has {count} of {wanted}" for name, count in counts.items() if count < wanted]


def _table(results: Results, parts: dict[str, Replies], speed: bool) -> list[str]:
    full = parts.get(FULL)
    head = [
        "arm",
        "memory",
        "held",
        "right",
        "against full",
        f"against {RANDOM}",
        "tokens",
        "cut off",
        "evicted from",
        "right there (full)",
        *(["speed"] if speed else []),
    ]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, part in parts.items():
        everyone = results.peer(part.arm)
        peer = None if everyone is None else parts.get(everyone.arm.name)
        replies = list(part.lines.values())
        cells = [
            name,
            _percent(part.memory),
            f"{part.held:.0f}",
            _interval(part.accuracy()),
            _difference(part.against(full)) if full is not None and part is not full else _NONE,
            _difference(part.against(peer)) if peer is not None else _NONE,
            f"{statistics.fmean(line['tokens'] for line in replies):.0f}",
            _percent(statistics.fmean(line["finish"] == "length" for line in replies)),
            _NONE if part.arm.index is None else _percent(len(part.evicted) / len(replies)),
            _where_evicted(part, full),
        ]
        lines.append(f"| {' | '.join([*cells, *([_speed(results, part, full)] if speed else [])])} |")
    return lines


def _duels(results: Results) -> list[str]:
    """Compare ``lethe`` with every other policy that has its budget and interval; nothing where there is none."""
    rows = []
    for mine in results.replies.values():
        if mine.arm.config is None or mine.arm.config.policy != OURS:
            continue
        for other in results.replies.values():
            if other.arm.config is not None and other.arm.config.policy != OURS and alike(mine.arm, other.arm):
                rows.append(f"| {mine.arm.name} | {other.arm.name} | {_difference(mine.against(other))} |")
    return ["| arm | against | difference |", "| --- | --- | ---: |", *rows] if rows else []


def _where_evicted(part: Replies, full: Replies | None) -> str:
    """Accuracy on the requests that lost something and, on the same ones, that of the full cache."""
    if not part.evicted:
        return _NONE
    right = _percent(part.where(part.evicted).accuracy().mean)
    common = [key for key in part.evicted if full is not None and key in full.lines]
    there = _NONE if full is None or not common else _percent(full.where(common).accuracy().mean)
    return f"{right} ({there})"


def _speed(results: Results, part: Replies, full: Replies | None) -> str:
    ratio = f"{part.speed / full.speed:.2f} x" if full is not None and full.speed else _NONE
    return ratio if _on_cpu(results) else f"{part.speed:.0f} tok/s, {ratio}"


def _on_cpu(results: Results) -> bool:
    devices = [facts.get("device", "cpu") for run in results.runs for facts in run["servers"].values()]
    return not devices or "cpu" in devices


def _legend(results: Results) -> Iterator[str]:
    sampled = any(replies.sampled for replies in results.replies.values())
    interval = "bootstrap over problems, within each task" if sampled else "Wilson"
    test = "sign-flip permutation test over problems" if sampled else "exact McNemar test"
    yield "- **memory**: KV blocks held over what stock SGLang would hold at the same decode steps, shared prompts"
    yield "  apart; **held**: those blocks (of one token) per request, mean over decode steps."
    yield f"- **right**: share of right replies with its 95 % interval ({interval})."
    yield f"- **against**: difference in points on the same problems, 95 % interval, p of the {test} (two-sided,"
    yield f"  not corrected for the number of arms), problems won : lost. `{RANDOM}` has the same budget and interval."
    yield "- **tokens**: mean length of a reply; **cut off**: replies that ran into the bound on new tokens."
    yield "- **evicted from**: replies that lost at least one token; **right there**: accuracy on those alone, and in"
    yield "  brackets that of the full cache on the same problems."
    if _on_cpu(results):
        yield "- **speed**: generated tokens per second over those of full. A shared CPU: for orientation only."
    else:
        yield "- **speed**: generated tokens per second, and over those of full; to compare speeds use `lethe bench`."


def _interval(mean: Mean) -> str:
    return f"{100 * mean.mean:.1f} [{100 * mean.low:.1f}, {100 * mean.high:.1f}]"


def _difference(found: Paired | None) -> str:
    if found is None:
        return _NONE
    gain, low, high = (f"{_unsigned_zero(100 * value):+.1f}" for value in found[:3])
    p = "p < 0.001" if found.p < 0.001 else f"p {found.p:.3f}" if found.p < 0.1 else f"p {found.p:.2f}"
    return f"{gain} [{low}, {high}], {p}, {found.wins}:{found.losses}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else _NONE


def _unsigned_zero(value: float) -> float:
    return 0.0 if abs(value) < 0.05 else value
