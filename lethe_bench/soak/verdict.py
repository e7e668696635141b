"""What a soak found, what of it is a fault, and how it is written."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

ALARMS = ("Mem Leak", "memory leak", "double free", "Traceback")
"""What a server's log never holds when all is well."""

GROWTH = 64.0
"""Most growth of a process, in MiB an hour, unless another bound is asked for."""

FITTED_SECONDS = 300.0
"""Shortest stretch to which a line is fitted: over less, its slope is noise."""


class Memory(NamedTuple):
    """Memory of the processes (name -> MiB, files apart) of an idle server, so many seconds after the traffic began."""

    seconds: float
    resident: dict[str, float]


@dataclass
class Soaked:
    """What happened.

    Attributes
    ----------
    seconds
        From the first request to the last reply.
    done
        Requests by kind and acts of control by name that did what they should.
    errors
        Everything else, by kind and reason.
    memory
        Samples in order of time.
    compared, different
        Tokens of untouched replies that were compared with stock's, and the names of the replies that differed.
    effects
        What the server counted: rounds, requests retracted.
    alarms
        Lines of the log that hold one of :data:`ALARMS`.
    faults
        What went wrong when processes were ended under load; None while that has not been tried.
    interrupted
        Whether somebody ended it early.
    beside
        The same of a stock server under the same traffic; None while that has not been tried.
    """

    seconds: float = 0.0
    done: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    memory: list[Memory] = field(default_factory=list)
    compared: int = 0
    different: list[str] = field(default_factory=list)
    effects: dict[str, int] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    faults: dict[str, str] | None = None
    interrupted: bool = False
    beside: Soaked | None = None


def alarms(log: str) -> list[str]:
    """Return the lines of a log that hold an alarm; the line of the server's arguments is none."""
    pattern = re.compile("|".join(map(re.escape, ALARMS)))
    return [line[:200] for line in log.splitlines() if pattern.search(line) and "server_args=" not in line]


def growth(samples: Sequence[Memory], name: str) -> tuple[float, float]:
    """Fit a line to a process's memory over the second half of the samples' time.

    Returns
    -------
    slope, seconds
        MiB an hour, and the length of what it was fitted to; 0 and 0 with fewer than three samples there.
    """
    middle = (samples[0].seconds + samples[-1].seconds) / 2 if samples else 0.0
    points = [(s.seconds, s.resident[name]) for s in samples if s.seconds >= middle and name in s.resident]
    if len(points) < 3:
        return 0.0, 0.0
    times, sizes = zip(*points, strict=True)
    return statistics.linear_regression(times, sizes).slope * 3600, times[-1] - times[0]


def _judged(samples: Sequence[Memory], name: str) -> float | None:
    """Return the growth of a process, None if it was not seen for long enough."""
    slope, seconds = growth(samples, name)
    return slope if seconds >= FITTED_SECONDS else None


def names(samples: Sequence[Memory]) -> list[str]:
    """Return the processes that were there at the end, in order."""
    return sorted(samples[-1].resident) if samples else []


def verdict(found: Soaked, bound: float = GROWTH, wanted: Sequence[str] = ()) -> list[str]:
    """Return what is wrong, one line each; nothing if the server came through.

    Parameters
    ----------
    found
        What happened.
    bound
        Most growth of any process beyond that of the same process of a stock server, in MiB an hour.
    wanted
        What must have been done at least once.
    """
    wrong = [f"{count} x {error}" for error, count in sorted(found.errors.items())]
    wrong += [f"in the log: {line}" for line in found.alarms]
    wrong += [f"{name}: not stock's reply" for name in found.different]
    wrong += [f"never done: {name}" for name in wanted if not found.done[name]]
    if not found.compared:
        wrong.append("no token was compared with stock's")
    wrong += [f"the server counted no {name}" for name, count in found.effects.items() if not count]
    for name in names(found.memory):
        slope, stock = _judged(found.memory, name), _judged(found.beside.memory if found.beside else [], name)
        if slope is not None and slope > (limit := bound + max(0.0, stock or 0.0)):
            wrong.append(f"{name}: grows by {slope:.0f} MiB an hour, more than {limit:.0f}")
    first = found.memory[0].resident if found.memory else {}
    wrong += [f"{name}: a process that was not there at the start" for name in names(found.memory) if name not in first]
    wrong += [f"{name}: {outcome}" for name, outcome in (found.faults or {}).items() if outcome != GONE]
    return wrong


GONE = "ended, and no process was left"
"""Outcome of a server that was ended under load as it should be."""


def to_json(found: Soaked, bound: float, wrong: Sequence[str], about: dict[str, Any]) -> dict[str, Any]:
    """Return everything, for a file."""
    return {
        **about,
        **_plain(found),
        "wrong": list(wrong),
        "bound_mib_per_hour": bound,
        "beside": None if found.beside is None else _plain(found.beside),
    }


def _plain(found: Soaked) -> dict[str, Any]:
    """Return what happened as JSON has it, with the growth of each process."""
    fits = {name: growth(found.memory, name) for name in names(found.memory)}
    return {
        **vars(found),
        "growth_mib_per_hour": {name: round(slope, 2) for name, (slope, _) in fits.items()},
        "memory": [{"seconds": round(sample.seconds, 1), **sample.resident} for sample in found.memory],
    }


def to_markdown(found: Soaked, bound: float, wrong: Sequence[str], about: dict[str, Any]) -> str:
    """Return the page."""
    lines = ["# Endurance", ""]
    state = "Interrupted" if found.interrupted else "**Passed**" if not wrong else "**Failed**"
    lines += [f"{state} after {found.seconds / 60:.1f} minutes of mixed traffic.", ""]
    lines += [f"- {line}" for line in wrong] + [""] * bool(wrong)
    lines += [f"- {name}: {value}" for name, value in about.items()] + [""]
    lines += ["| what | times |", "| --- | ---: |"]
    lines += [f"| {name} | {count} |" for name, count in sorted(found.done.items())]
    lines += [f"| {name} (the server's count) | {count} |" for name, count in found.effects.items()]
    lines += [f"| tokens compared with stock's | {found.compared} |"]
    lines += [f"| replies that differ from stock's | {len(found.different)} |"]
    lines += [f"| error: {_cell(error)} | {count} |" for error, count in sorted(found.errors.items())]
    lines += [f"| fault: {name} | {outcome} |" for name, outcome in (found.faults or {}).items()]
    allowed = f"Memory (MiB, files apart) of the idle server; at most {bound:g} MiB an hour more is allowed"
    if found.beside is None:
        return "\n".join([*lines, *_growth(found, f"{allowed}.")]) + "\n"
    lines += _growth(found, f"{allowed} than a stock server grows.")
    beside = found.beside
    lines += _growth(beside, f"A stock server after {beside.seconds / 60:.1f} minutes of the same traffic:")
    wrong = verdict(replace(beside, memory=[]))
    lines += ["", "- " + "\n- ".join(wrong) if wrong else "It made no error."]
    return "\n".join(lines) + "\n"


def _growth(found: Soaked, about: str) -> list[str]:
    """Return a table of memory, with a line in front."""
    lines = ["", about, "", "| process | start | middle | end | fitted over | growth an hour |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name in names(found.memory):
        there = [sample.resident[name] for sample in found.memory if name in sample.resident]
        slope, seconds = growth(found.memory, name)
        start, middle, end = there[0], there[len(there) // 2], there[-1]
        fit = f"{seconds / 60:.1f} min | {slope:+.1f}" if seconds >= FITTED_SECONDS else "too short to judge |"
        lines.append(f"| {name} | {start:.0f} | {middle:.0f} | {end:.0f} | {fit} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
