"""Running kits against a server."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import threading
import time
import unittest
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lethe_bench.kits.table import KITS, REPLY_SECONDS
from lethe_bench.servers import Server

LIMIT = 600
"""Seconds after which all requests of a test that runs alone are aborted."""

TOGETHER = 12
"""Tests that run at once: a step of many requests takes little longer than a step of one."""

_COLUMNS = 160

Outcome = dict[str, Any]
"""Of a test: its ``error`` (empty if it passed), ``seconds``, and the ``rounds`` of the server meanwhile."""


def run(names: Sequence[str], server: Server, model: str, keep: Callable[[str, str, Outcome], None]) -> None:
    """Run all tests of some kits: first those that may run at once, then the others, one by one.

    Parameters
    ----------
    names
        Keys of :data:`KITS`.
    server
        Runs, and is idle.
    model
        Directory of its model.
    keep
        Takes kit, test and outcome as each is known.

    Raises
    ------
    SystemExit
        If the server ends.
    """
    lock = threading.Lock()

    def one(name: str, case: unittest.TestCase, limit: float) -> None:
        found = outcome(case, server, limit)
        with lock:
            keep(name, case.id().rpartition(".")[2], found)

    with contextlib.redirect_stdout(io.StringIO()):  # the kits print whole replies
        with ThreadPoolExecutor(TOGETHER) as pool:
            together = [
                pool.submit(one, name, case, threading.TIMEOUT_MAX)
                for name in names
                if not KITS[name].alone
                for case in KITS[name].cases(server, model)
            ]
            for done in together:
                done.result()
        for name in names:
            for case in KITS[name].cases(server, model) if KITS[name].alone else ():
                one(name, case, LIMIT)
                if server.status is not None:
                    raise SystemExit(f"the server ended in {case.id()}")
    if server.status is not None:
        raise SystemExit("the server ended while tests ran together")


def outcome(case: unittest.TestCase, server: Server, limit: float) -> Outcome:
    """Run one test."""
    result, before, started = unittest.TestResult(), _rounds(server), time.monotonic()
    with limited(server, limit):
        case.run(result)
    seconds = time.monotonic() - started
    if wrong := result.failures + result.errors:
        with contextlib.suppress(OSError):  # a test of pauses that fails leaves the server paused
            server.post("/continue_generation", {}, timeout=10)
    error = reason(wrong[0][1]) if wrong else ""
    return {"error": error, "seconds": round(seconds, 1), "rounds": _rounds(server) - before}


@contextlib.contextmanager
def limited(server: Server, seconds: float) -> Iterator[None]:
    """Abort all requests of the server if the block takes longer: no kit has a time limit for all that it does."""

    def abort() -> None:
        with contextlib.suppress(OSError):
            server.post("/abort_request", {"abort_all": True}, timeout=10)

    timer = threading.Timer(seconds, abort)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _rounds(server: Server) -> int:
    """Return the rounds of the server so far; 0 of stock SGLang."""
    with contextlib.suppress(OSError):  # a server that has ended is seen by its status
        state = server.get("/server_info", REPLY_SECONDS)["internal_states"][0]
        return int(state.get("lethe", {}).get("rounds", 0))
    return 0


def reason(trace: str) -> str:
    """Return the message of a traceback as one short line that a table can hold, without names of this machine."""
    lines = [line for line in trace.splitlines() if line and not line.startswith((" ", "Traceback"))]
    text = re.sub(r"/[\w./-]+", _without_folders, " ".join(lines[0].split()).replace("|", "/"))
    return text if len(text) <= _COLUMNS else text[: _COLUMNS - 3] + "..."


def _without_folders(path: re.Match[str]) -> str:
    """Return the last part of what is a path here, and anything else as it is."""
    return Path(path[0]).name if Path(path[0]).exists() else path[0]


def say(line: str) -> None:
    """Print a line of progress, whatever is done with standard output."""
    print(line, file=sys.stderr, flush=True)
