"""What a goal is, how it is measured within a limit of time, and when there is a verdict.

Arms are measured one after the other, and that again in each repeat, every other time in the opposite order, so that
what drifts (the clock of a hot GPU, say) does not fall on one arm alone. There is a verdict only if every repeat was
measured whole; of anything less the file says what is missing.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

STOPPING_SECONDS = 20
"""Of the limit, kept for ending a server."""

Sample = dict[str, Any]
"""What one arm gave in one repeat: ``arm``, ``repeat``, ``seconds`` that it took, and what the goal measures."""


class Bound(NamedTuple):
    """What is asked of a number: at least, or at most, so much; of the median of all repeats, or of each one."""

    value: float
    unit: str
    at_least: bool = False
    of_each: bool = False

    def holds(self, values: Sequence[float]) -> bool:
        """Whether it is met."""
        worst = min(values) if self.at_least else max(values)
        value = worst if self.of_each else statistics.median(values)
        return value >= self.value if self.at_least else value <= self.value


class Limit:
    """Seconds that a run may take, from its making on."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._began = seconds, time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds until a server has to be ended; never negative."""
        return max(0.0, self.seconds - STOPPING_SECONDS - self.spent)


class Goal(ABC):
    """One goal.

    Attributes
    ----------
    name
        As the command line has it.
    asks
        The goal, in words.
    sizes
        Why it is measured at these sizes.
    bound
        What each of the numbers of :meth:`judged` is held against.
    repeats
        How often each arm is measured.
    arm_seconds
        What one arm takes once, about: an estimate.
    """

    name: ClassVar[str]
    asks: ClassVar[str]
    sizes: ClassVar[str]
    bound: ClassVar[Bound]
    repeats: ClassVar[int]
    arm_seconds: ClassVar[float]

    @abstractmethod
    def arms(self, samples: Sequence[Sample]) -> list[str]:
        """Return the arms of a repeat, as far as the samples so far tell."""
        ...

    @abstractmethod
    def runs(self, arm: str, samples: Sequence[Sample] = ()) -> str:
        """Return the command line of an arm's server, or what is measured."""
        ...

    @abstractmethod
    def sample(self, arm: str, samples: Sequence[Sample], left: Callable[[], float]) -> Sample:
        """Measure an arm once.

        Raises
        ------
        RuntimeError
            If it fails, or more time is needed than is ``left``.
        """
        ...

    @abstractmethod
    def judged(self, repeat: dict[str, Sample]) -> dict[str, float]:
        """Return the numbers of one whole repeat that are held against the bound: name -> number."""
        ...

    def listing(self, limit: float) -> list[str]:
        """Say what would run, how long it takes about, and why at these sizes."""
        arms = self.arms(())
        estimate = self.repeats * len(arms) * self.arm_seconds
        return [
            f"goal {self.name}: {self.asks}",
            f"goal {self.name}: about {estimate:.0f} s for {self.repeats} repeats of {', '.join(arms)}, by an estimate "
            f"that no GPU has confirmed; limit {limit:g} s",
            f"goal {self.name}: {self.sizes}",
            *(f"goal {self.name} {arm}: {self.runs(arm)}" for arm in arms),
        ]


def measure(goal: Goal, limit: Limit, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure a goal within a limit and return its result; ``keep`` takes the result so far behind every sample.

    No arm is started if the rest of its repeat would outlast the limit, each arm taking as long as the longest so far.
    """
    samples: list[Sample] = []
    why = ""
    for repeat in range(1, goal.repeats + 1):
        done: list[str] = []
        while not why and (arm := _next(goal, samples, repeat, done)) is not None:
            longest = max((sample["seconds"] for sample in samples), default=0.0)
            needed = longest * (len(goal.arms(samples)) - len(done))
            if limit.left <= needed:
                why = f"limit of {limit.seconds:g} s: the repeat would need {needed:.0f} s, {limit.left:.0f} s are left"
                break
            began = limit.spent
            try:
                found = goal.sample(arm, samples, lambda: limit.left)
            except RuntimeError as error:  # a server's, or CUDA's: the file says so
                why = f"{arm}: {error}"
                break
            samples.append({"repeat": repeat, "arm": arm, "seconds": round(limit.spent - began, 1), **found})
            done.append(arm)
            keep(result(goal, samples, limit, "not begun yet"))
    found = result(goal, samples, limit, why)
    keep(found)
    return found


def _next(goal: Goal, samples: Sequence[Sample], repeat: int, done: Sequence[str]) -> str | None:
    """Return the arm that is next in a repeat, None behind the last; every other repeat runs backwards."""
    arms = goal.arms(samples)
    return next((arm for arm in (arms if repeat % 2 else arms[::-1]) if arm not in done), None)


def result(goal: Goal, samples: Sequence[Sample], limit: Limit, why: str) -> dict[str, Any]:
    """Return what the samples say of a goal.

    Returns
    -------
    dict
        Every sample; of each judged number its median, its spread and its value in each whole repeat; ``missing``, in
        words; ``met``, None unless nothing is missing.
    """
    arms = goal.arms(samples)
    by_repeat = [{s["arm"]: s for s in samples if s["repeat"] == r} for r in range(1, goal.repeats + 1)]
    whole = [found for found in by_repeat if set(arms) <= set(found)]
    missing = [
        f"repeat {number}: {', '.join(arm for arm in arms if arm not in found)} ({why})"
        for number, found in enumerate(by_repeat, 1)
        if not set(arms) <= set(found)
    ]
    missing += [f"repeat {s['repeat']}: {s['arm']}: {s['void']}" for s in samples if s.get("void")]
    numbers: dict[str, list[float]] = {}
    for found in whole:
        for name, value in goal.judged(found).items():
            numbers.setdefault(name, []).append(value)
    return {
        "asks": goal.asks,
        "bound": goal.bound._asdict(),
        "sizes": goal.sizes,
        "settings": {arm: goal.runs(arm, samples) for arm in arms},
        "limit_s": limit.seconds,
        "spent_s": round(limit.spent, 1),
        "samples": list(samples),
        "judged": {
            name: {"median": statistics.median(v), "smallest": min(v), "largest": max(v), "values": v}
            for name, v in numbers.items()
        },
        "missing": missing,
        "met": None if missing else all(goal.bound.holds(values) for values in numbers.values()),
    }
