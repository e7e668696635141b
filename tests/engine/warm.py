"""Start Python programs that have imported SGLang before they begin (``zygote.py``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from lethe_sglang.processes import kill_group

READ_WHEN_IMPORTED = ("TRITON_INTERPRET",)
"""Variables that are looked at while modules are imported: programs that differ in them have a zygote each."""


class Zygote:
    """A process that has imported SGLang, with some environment."""

    def __init__(self, environment: dict[str, str]):
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **request):
        """Send it a request and return its answer."""
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def stop(self) -> None:
        """End it; it goes when nobody can ask it any more."""
        self._process.communicate()


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
            self._zygotes[early] = Zygote(whole)
        files = {"out": str(log), "errors": str(errors or log), "folder": str(folder or Path.cwd())}
        zygote = self._zygotes[early]
        return Started(zygote, zygote.ask(command=list(map(str, command)), environment=whole, **files))

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
