"""A part's slot of time, and what is recorded of servers that did not do in it what they should."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

LEAST_SECONDS = 180
"""A server is not started with less time left, unless it is the first of a call."""


class OutOfTime(Exception):
    """The slot is over."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` inside the block after so many seconds, one at least; main thread only."""

    def over(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def unfinished(seconds: float) -> dict[str, Any]:
    """Return the record of what took longer than the seconds it had."""
    return {"status": "unfinished", "message": f"not done in {seconds:.0f} s"}


def failure(message: str) -> dict[str, Any]:
    """Return the record of what failed; a refusal by the plugin is told from other failures."""
    for line in message.splitlines():
        for sign in ("lethe: error: ", "ConfigError: "):
            if sign in line:
                return {"status": "refused", "message": f"refused: {line.partition(sign)[2].strip()}"}
    return {"status": "failed", "message": "\n".join(message.splitlines()[-5:])}


def in_a_cell(record: dict[str, Any]) -> str:
    """Say in a cell of a table what became of a run that was not measured."""
    message = str(record["message"]).replace("\n", " ").replace("|", "/")
    return f"{record['status']}: {message.removeprefix('refused: ')}"
