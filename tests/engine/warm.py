"""Start Python programs that have imported SGLang before they begin (``zygote.py``)."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from lethe_sglang.processes import kill_group

PROGRAM = Path(__file__).with_name("zygote.py")
READ_WHEN_IMPORTED = ("TRITON_INTERPRET",)
"""Variables that are looked at while modules are imported: programs that differ in them have a zygote each."""


class Zygote:
    """A line to a process that has imported SGLang, with some environment; all workers of a test run share it."""

    def __init__(self, environment: dict[str, str], address: Path):
        self._lock = threading.Lock()
        for _ in range(3):  # one that is about to end hangs up
            with PROGRAM.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._line = _reached(address) or _begun(environment, address)
            self._answers = self._line.makefile()
            with contextlib.suppress(OSError, json.JSONDecodeError):
                self.ask()
                return
        raise RuntimeError(f"{PROGRAM} ends before it answers")

    def ask(self, **request):
        """Send it a request and return its answer."""
        with self._lock:
            self._line.sendall(json.dumps(request).encode() + b"\n")
            return json.loads(self._answers.readline())

    def stop(self) -> None:
        """Hang up; it ends when nobody is on the line any more."""
        self._answers.close()
        self._line.close()


def _reached(address: Path) -> socket.socket | None:
    """Return a line to a zygote that is there."""
    line = socket.socket(socket.AF_UNIX)
    try:
        line.connect(str(address))
    except OSError:
        line.close()
        return None
    return line


def _begun(environment: dict[str, str], address: Path) -> socket.socket:
    """Start a zygote and return a line to it."""
    address.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        number = listener.fileno()
        command = [sys.executable, str(PROGRAM), str(number)]
        subprocess.Popen(command, env=environment, pass_fds=[number], start_new_session=True)
    return _reached(address)


class Warm:
    """Starts programs, whose environment is that of this process and what is laid over it."""

    def __init__(self, environment: dict[str, str]):
        self._environment = environment
        self._zygotes: dict[tuple, Zygote] = {}

    def start(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        log: Path,
        errors: Path | None = None,
        folder: Path | None = None,
    ) -> Started:
        """Start what ``command`` says behind the interpreter: ``-m MODULE ...``, ``-c CODE ...`` or ``FILE ...``.

        It prints to ``log`` and ``errors``, one file by default, and runs in ``folder``.
        """
        whole = {**os.environ, **self._environment, **environment}
        early = tuple(whole.get(name) for name in READ_WHEN_IMPORTED)
        if early not in self._zygotes:
            self._zygotes[early] = Zygote(whole, self._address(early))
        files = {"out": str(log), "errors": str(errors or log), "folder": str(folder or Path.cwd())}
        zygote = self._zygotes[early]
        return Started(zygote, zygote.ask(command=list(map(str, command)), environment=whole, **files))

    def _address(self, early: tuple) -> Path:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
        name = hashlib.sha256(repr((run, early)).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir(), f"lethe-zygote-{name}")

    def run(
        self, command: Sequence[str], folder: Path | None = None, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess:
        """Run a program to its end; returns its status and what it printed."""
        with tempfile.TemporaryDirectory() as kept:
            out, errors = Path(kept, "out"), Path(kept, "errors")
            program = self.start(command, environment, out, errors, folder)
            try:
                status = program.wait(timeout)
            finally:
                kill_group(program)
            return subprocess.CompletedProcess(command, status, out.read_text(), errors.read_text())

    def stop(self) -> None:
        """End the zygotes."""
        while self._zygotes:
            self._zygotes.popitem()[1].stop()


class Started:
    """A program, with what a test uses of ``subprocess.Popen``."""

    def __init__(self, zygote: Zygote, pid: int):
        self.pid, self._zygote, self._status = pid, zygote, None

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        if self._status is None:
            self._status = self._zygote.ask(poll=self.pid)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return self._status
