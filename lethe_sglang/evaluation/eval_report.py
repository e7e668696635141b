"""What an experiment's replies say: accuracies with intervals, paired tests, memory, and the Markdown page."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lethe_sglang.evaluation import eval_plots
from lethe_sglang.evaluation.eval_plots import Picture, Point
from lethe_sglang.evaluation.eval_store import Store, read_lines
from lethe_sglang.evaluation.experiment import FULL, Arm, Experiment
from lethe_sglang.evaluation.statistics import Mean, Paired, paired, paired_means, pooled_mean, wilson

RANDOM = "random"
"""The policy that every other has to beat."""

OURS = "lethe"

_ALL = "all tasks"
_NONE = "-"


@dataclass(frozen=True)
class Replies:
    """The replies of one arm to some tasks.

    Attributes
    ----------
    arm
        Whose.
    lines
        (problem, sample) -> line of the results.
    """

    arm: Arm
    lines: dict[tuple[str, int], dict[str, Any]]

    def of(self, task: str) -> Replies:
        """Return those to one task."""
        return self.where(key for key, line in self.lines.items() if line["task"] == task)

    def where(self, keys: Iterable[tuple[str, int]]) -> Replies:
        """Return some of them."""
        return Replies(self.arm, {key: self.lines[key] for key in keys})

    @cached_property
    def evicted(self) -> list[tuple[str, int]]:
        """Those from which something was evicted."""
        return [
            key
            for key, line in self.lines.items()
            if line["memory"]["rounds"] and sum(line["memory"]["evicted_per_layer"])
        ]

    @property
    def sampled(self) -> bool:
        """Whether a problem was answered more than once."""
        return any(sample for _, sample in self.lines)

    def strata(self) -> dict[str, dict[str, float]]:
        """Return the share of right replies: task -> problem -> share."""
        found: dict[str, dict[str, list[bool]]] = {}
        for (problem, _), line in self.lines.items():
            found.setdefault(line["task"], {}).setdefault(problem, []).append(line["ok"])
        return {task: {key: statistics.fmean(oks) for key, oks in problems.items()} for task, problems in found.items()}

    def accuracy(self) -> Mean:
        """Share of right replies with its 95 % interval: Wilson's, or over problems where these were sampled."""
        if self.sampled:
            return pooled_mean([list(problems.values()) for problems in self.strata().values()])
        right, total = sum(line["ok"] for line in self.lines.values()), len(self.lines)
        return Mean(right / total, *wilson(right, total))

    def against(self, other: Replies) -> Paired | None:
        """Compare with another arm on what both have answered; None if that is nothing."""
        common = sorted(self.lines.keys() & other.lines.keys())
        if not common:
            return None
        mine, theirs = self.where(common), other.where(common)
        if mine.sampled:
            one, two = mine.strata(), theirs.strata()
            return paired_means([(list(one[t].values()), [two[t][key] for key in one[t]]) for t in one])
        return paired([mine.lines[key]["ok"] for key in common], [theirs.lines[key]["ok"] for key in common])

    @property
    def memory(self) -> float:
        """Blocks held over what stock would hold at the same steps, shared prompts apart, over all decode steps."""
        stock = self._block_steps("own_stock_mean")
        return self._block_steps("own_held_mean") / stock if stock else 1.0

    @property
    def held(self) -> float:
        """Blocks that a request holds besides its shared prompt, mean over decode steps."""
        return self._block_steps("own_held_mean") / max(sum(int(m["steps"]) for m in self._memories), 1)

    @property
    def speed(self) -> float:
        """Generated tokens per second, over the time in which the arm's requests ran."""
        ends: dict[int, float] = {}
        for line in self.lines.values():
            ends[line["segment"]] = max(ends.get(line["segment"], 0.0), line["at"])
        tokens = sum(int(line["tokens"]) for line in self.lines.values())
        return tokens / max(math.fsum(ends.values()), 1e-9)

    @property
    def _memories(self) -> Iterator[dict[str, Any]]:
        return (line["memory"] for line in self.lines.values())

    def _block_steps(self, name: str) -> float:
        return math.fsum(m[name] * m["steps"] for m in self._memories)


@dataclass(frozen=True)
class Results:
    """Everything that a results directory holds."""

    experiment: Experiment
    runs: list[dict[str, Any]]
    replies: dict[str, Replies]
    traces: list[dict[str, Any]]

    @classmethod
    def read(cls, directory: Path) -> Results:
        """Read a results directory.

        Raises
        ------
        ConfigError
            If it holds none.
        """
        store = Store(directory)
        experiment = store.experiment()
        replies = {}
        for arm in experiment.every_arm():
            lines = {(line["id"], line["sample"]): line for line in read_lines(store.generations(arm.name))}
            if lines:
                replies[arm.name] = Replies(arm, lines)
        return cls(experiment, store.config()["runs"], replies, read_lines(store.traces))

    def peer(self, arm: Arm) -> Replies | None:
        """Return the replies of policy ``random`` at an arm's budget and interval."""
        if arm.config is None or arm.config.policy == RANDOM:
            return None
        for found in self.replies.values():
            if found.arm.config is not None and found.arm.config.policy == RANDOM and alike(arm, found.arm):
                return found
        return None

    @property
    def tasks(self) -> list[str]:
        """Tasks that have replies, in the order of the experiment."""
        there = {line["task"] for replies in self.replies.values() for line in replies.lines.values()}
        return [task.label for task in self.experiment.tasks if task.label in there]


def alike(one: Arm, other: Arm) -> bool:
    """Whether two evicting arms have the same budget, interval and treatment of prompts."""
    shapes = [
        (arm.config.budget.tokens, arm.config.rounds.interval, arm.config.retain.prompt)
        for arm in (one, other)
        if arm.config is not None
    ]
    return len(shapes) == 2 and shapes[0] == shapes[1]


def write(directory: Path) -> str:
    """Write ``report.md``, its pictures and ``replies.csv`` into a results directory, and return the page.

    Raises
    ------
    ConfigError
        If the directory holds no results.
    """
    results = Results.read(directory)
    pictures = draw(results, directory) if results.replies and eval_plots.available() else []
    page = to_markdown(results, pictures)
    (directory / "report.md").write_text(page + "\n", encoding="utf-8")
    write_replies(results, directory / "replies.csv")
    return page


def write_replies(results: Results, path: Path) -> None:
    """Write one line per reply without its text, from which every number of the page follows."""
    with path.open("w", newline="", encoding="utf-8") as file:
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
    pictures = [eval_plots.plot_accuracy(directory / "accuracy.png", panels, full)] if panels else []
    budgets: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for trace in results.traces:
        traced = results.replies.get(trace["arm"])
        if traced is not None and traced.arm.config is not None and trace["rounds"]:
            budget = f"{traced.arm.config.budget.tokens} tokens"
            budgets.setdefault(budget, {}).setdefault(trace["arm"], []).append(trace)
    if budgets:
        layers = {
            title: {arm.partition("@")[0]: eval_plots.kept_per_layer(found) for arm, found in arms.items()}
            for title, arms in budgets.items()
        }
        pictures.append(eval_plots.plot_layers(directory / "layers.png", layers))
    for title, arms in budgets.items():
        first = {arm: found[0]["rounds"] for arm, found in arms.items()}
        pictures.append(eval_plots.plot_kept(directory / f"kept-{title.partition(' ')[0]}.png", first))
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
    if not eval_plots.available():
        lines += ["No pictures: matplotlib is not installed (`pip install 'lethe-sglang[plot]'`).", ""]
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
