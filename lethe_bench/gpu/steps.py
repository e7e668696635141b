"""Decode steps of a server by its own clock, from its log.

With ``--decode-log-interval 1`` SGLang writes a line behind every decode step: the requests in it, the tokens that they
hold, and the tokens per second since the line before. The time of a step is what divides the two, so it has
everything in it that the scheduler did between two results: rounds, plans, admission and prefills. It has nothing of
the tokenizer, the detokenizer and HTTP in it, which run beside the scheduler and delay a client's token by more than
what is looked for here.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from lethe_bench.servers import Server, ServerError, tail

_LINE = re.compile(
    r"(?P<prefill>Prefill batch)|Decode batch.*?#running-req: (\d+),.*?#(?:full )?token: (\d+)"
    r".*?gen throughput \(token/s\): ([\d.]+), #queue-req: (\d+)"
)
NEIGHBOURS = 32
"""Steps before and behind one that say how long it should have taken."""


class Step(NamedTuple):
    """One decode step.

    Attributes
    ----------
    running, held, waiting
        Requests in it, KV tokens that requests held, requests in the queue.
    seconds
        Since the step before.
    prefills
        Batches that were prefilled since then.
    """

    running: int
    held: int
    waiting: int
    seconds: float
    prefills: int


def read_steps(text: str) -> list[Step]:
    """Read a log's decode steps; a last line that is not whole yet is left out."""
    steps, prefills = [], 0
    for line in text.splitlines(keepends=True):
        found = _LINE.search(line) if line.endswith("\n") else None
        if found is None:
            continue
        if found["prefill"]:
            prefills += 1
            continue
        running, held, speed, waiting = found.groups()[1:]
        if float(speed):
            steps.append(Step(int(running), int(held), int(waiting), int(running) / float(speed), prefills))
            prefills = 0
    return steps


def watch(
    server: Server,
    offset: int,
    found: Callable[[list[Step]], list[Step] | None],
    load: Future[Any] | None,
    seconds: float,
) -> list[Step]:
    """Wait until the steps of a server's log, from a byte on, hold what is looked for.

    Parameters
    ----------
    found
        Returns the steps that are looked for, None as long as they are not all there.
    load
        What the server works on.
    seconds
        Longest wait.

    Raises
    ------
    ServerError
        If the load is over or the time is up before.
    """
    deadline = time.monotonic() + seconds
    while True:
        over = load is not None and load.done()  # looked at first: what it wrote last is in the log then
        with server.log.open("rb") as file:
            file.seek(offset)
            steps = read_steps(file.read().decode(errors="replace"))
        if (wanted := found(steps)) is not None:
            return wanted
        if over and load is not None:
            raise ServerError(f"the load was over too early: {load.exception() or 'all replies are there'}")
        if time.monotonic() > deadline:
            raise ServerError(f"the time was up after {len(steps)} steps; the server's last lines:\n{tail(server.log)}")
        time.sleep(0.2)


def throughput(steps: Sequence[Step]) -> float:
    """Output tokens per second."""
    return sum(step.running for step in steps) / sum(step.seconds for step in steps)


def stalls(steps: Sequence[Step]) -> list[float]:
    """Return by how many seconds each step was longer than the median of its neighbours."""
    times = [step.seconds for step in steps]
    return [
        time - statistics.median(times[max(0, at - NEIGHBOURS) : at + NEIGHBOURS + 1]) for at, time in enumerate(times)
    ]
