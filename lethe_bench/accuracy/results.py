"""The replies of an experiment: shares of right ones, paired comparisons, memory, speed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lethe_bench.accuracy.experiment import Arm, Experiment
from lethe_bench.accuracy.store import Store
from lethe_bench.statistics import Mean, Paired, paired, paired_means, pooled_mean, wilson
from lethe_sglang.files import read_lines

RANDOM = "random"
"""The policy that every other has to beat."""


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
