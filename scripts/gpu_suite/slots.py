"""A part's slot of time, and what is recorded of servers that did not do in it what they should."""

from __future__ import annotations

import contextlib
import http.client
import signal
import tempfile
import time
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_suite.results import Results, say

if TYPE_CHECKING:
    from lethe_sglang.evaluation.servers import Server

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


def measure_each(results: Results, deadline: float, measure: Callable[[str, float], dict[str, Any]]) -> None:
    """Measure every record that is not there yet, as long as there is time; ``measure`` gets its key and the seconds.

    What was unfinished when its time was over is recorded only if it had all of the slot.
    """
    for number, key in enumerate(results.todo()):
        left = deadline - time.monotonic()
        if left < (LEAST_SECONDS if number else 1):
            return
        record = measure(key, left)
        if record["status"] == "unfinished" and number:
            say(f"{key}: not done in the {left:.0f} s that were left; the next call begins with it")
            return
        results.add(key, record)
        say(f"{key}: {record['status']} {record.get('message', '')}")


def with_server(command: Sequence[str], port: int, deadline: float, work: Callable[[Server], None]) -> str | None:
    """Start a server, do the work on it, end it.

    Parameters
    ----------
    command, port
        Of the server.
    deadline
        Of its start, in seconds of ``time.monotonic``; the work keeps to its own.
    work
        Gets the server once it is ready.

    Returns
    -------
    str or None
        Why server or work failed, None if they did not.

    Raises
    ------
    OutOfTime
        At the deadline, or by the work.
    """
    from lethe_sglang.evaluation.servers import Server, ServerError, ending_on_signals, tail

    with contextlib.ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
        stack.enter_context(ending_on_signals())
        try:
            with alarm(deadline - time.monotonic()):
                server = stack.enter_context(Server(command, port, log))
            work(server)
        except ServerError as error:
            return str(error)
        except urllib.error.HTTPError as error:
            return f"the server refused {error.url}: {error.read().decode(errors='replace')[:500]}"
        except (OSError, http.client.HTTPException) as error:
            return f"the server is gone ({error}); its last lines:\n{tail(log)}"
    return None


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
