"""Processes of a server: their memory, and whether all of them go when one is ended under load (Linux)."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from lethe_bench.servers import Server
from lethe_bench.soak.verdict import GONE

ENDS_SECONDS = 180.0
"""A server is gone so long after a signal at the latest; one that is asked nicely lets its requests end first."""

ANSWERED_SECONDS = 20.0
"""A client knows so long after the last process has gone that it gets no reply."""

LOADED_SECONDS = 4.0
"""From the requests to the signal: all of them decode by then."""


def session(leader: int) -> Iterator[tuple[int, str]]:
    """Yield number and name of the processes of a session, zombies apart."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            _, _, after = (folder / "stat").read_text().rpartition(")")
            state, _, _, in_session = after.split()[:4]
            if int(in_session) == leader and state != "Z":
                yield int(folder.name), _name(folder)


def of_session(leader: int) -> dict[str, float]:
    """Return the memory of a session's processes in MiB, by name; processes of one name are numbered.

    Pages of files are left out: the kernel takes those of libraries back when somebody else needs memory, and reads
    them again, which would look like a process that shrinks and grows.
    """
    found: dict[str, float] = {}
    for number, name in sorted(session(leader)):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{number}/status").read_text()
            own = sum(int(size) for size in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", status, re.MULTILINE))
            again = sum(known.split(" #")[0] == name for known in found)
            found[f"{name} #{again + 1}" if again else name] = round(own / 1024, 1)
    return found


def scheduler(leader: int) -> int:
    """Return the number of the scheduler of a server whose first process is ``leader``."""
    return next(number for number, name in session(leader) if "scheduler" in name)


def kill(number: int, name: str) -> None:
    """Send a signal by its name."""
    os.kill(number, signal.Signals[name])


def ended_under_load(
    server: Server, bodies: list[dict[str, Any]], end: Callable[[], None], within: float = ENDS_SECONDS
) -> str:
    """End a server while it answers; return :data:`GONE`, or what stayed.

    Parameters
    ----------
    server
        Runs, and is idle.
    bodies
        Requests of ``/generate`` that take longer than :data:`LOADED_SECONDS`.
    end
        Sends the signal.
    within
        Seconds after which what is still there stayed.
    """
    leader = server.pid
    with ThreadPoolExecutor(len(bodies)) as pool:
        replies = [pool.submit(_quietly, server, body, within) for body in bodies]
        time.sleep(LOADED_SECONDS)
        if all(reply.done() for reply in replies):
            return "every request had ended before the signal"
        end()
        deadline = time.monotonic() + within
        while (server.status is None or any(session(leader))) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [name for _, name in session(leader)]
        hang = not left and bool(wait(replies, ANSWERED_SECONDS).not_done)
        server.stop(grace=0)  # what stayed, so that the requests at it come back
    if left:
        return f"still there after {within:g} s: {', '.join(sorted(left))}"
    return "a request hangs though the server has gone" if hang else GONE


def _quietly(server: Server, body: dict[str, Any], timeout: float) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        server.post("/generate", body, timeout)


def _name(folder: Path) -> str:
    """Return what a process calls itself: SGLang's name, or the module that Python runs."""
    words = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").split()
    if not words:
        return (folder / "comm").read_text().strip()
    if words[0].startswith("sglang"):
        return words[0]
    for mark in ("resource_tracker", "launch_server", "spawn_main", "compile_worker"):
        if any(mark in word for word in words):
            return mark
    return Path(words[0]).name
