"""SGLang servers and clients as processes that are gone when their block is left, and the machine they run on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

HOST = "127.0.0.1"
READY_SECONDS = 900
"""Longest start of a server: a first start on a GPU compiles kernels and captures graphs."""

GRACE_SECONDS = 20
"""Time a server gets to end by itself before its processes are killed."""

_TAIL_LINES, _TAIL_COLUMNS = 20, 240
_DISTRIBUTIONS = ("lethe-sglang", "lethe-cpu", "sglang", "torch", "transformers", "triton", "flashinfer-python")


class ServerError(RuntimeError):
    """A server or a client that failed; the message ends with what it wrote last."""


class Server:
    """One SGLang server, in a process group of its own, from its start to the end of a ``with`` block.

    Parameters
    ----------
    command
        The whole command line, host and port included.
    port
        The port of that command line, on 127.0.0.1.
    log
        File that takes what the server prints.
    environment
        Variables laid over those of this process.

    Attributes
    ----------
    ready_seconds
        From the start to the first healthy answer.

    Examples
    --------
    >>> with Server(command, 31000, Path("server.log")) as server:  # doctest: +SKIP
    ...     server.get("/server_info")
    """

    def __init__(self, command: Sequence[str], port: int, log: Path, environment: dict[str, str] | None = None) -> None:
        self.command, self.port, self.log = list(command), port, log
        self.environment = {**os.environ, "NO_PROXY": HOST, "no_proxy": HOST, **(environment or {})}
        self.ready_seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> Server:
        """Start the server and wait until it is healthy.

        Raises
        ------
        ServerError
            If it ends or is not healthy within ``READY_SECONDS``.
        """
        started = time.monotonic()
        try:
            with self.log.open("wb") as out:
                self._process = subprocess.Popen(
                    self.command, stdout=out, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
                )
            while not self._healthy():
                if (status := self._process.poll()) is not None:
                    raise ServerError(f"the server ended with status {status} before it was ready:\n{tail(self.log)}")
                if time.monotonic() - started > READY_SECONDS:
                    raise ServerError(f"the server was not ready after {READY_SECONDS} s:\n{tail(self.log)}")
                time.sleep(0.5)
        except BaseException:
            self.stop()
            raise
        self.ready_seconds = time.monotonic() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all processes of the server."""
        self.stop()

    @property
    def url(self) -> str:
        """Address without a path."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Number of the first process, which is that of the session of all of them."""
        if self._process is None:
            raise ServerError("the server is not running")
        return self._process.pid

    def get(self, path: str, timeout: float = 60) -> Any:
        """Return the JSON answer to a GET request."""
        with self._opener.open(f"{self.url}{path}", timeout=timeout) as reply:
            return json.load(reply)

    def post(self, path: str, body: dict[str, Any], timeout: float = 600) -> str:
        """Return the text of the answer to a POST request with a JSON body."""
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", data=json.dumps(body).encode(), headers=headers)
        with self._opener.open(request, timeout=timeout) as reply:
            return str(reply.read().decode())

    def stop(self) -> None:
        """End all processes of the server and wait until its port is free; without effect the second time."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        finally:
            _kill_group(process)
        deadline = time.monotonic() + GRACE_SECONDS
        while not port_free(self.port) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError), self._opener.open(f"{self.url}/health", timeout=10) as reply:
            return bool(reply.status == 200)
        return False


def run_client(
    command: Sequence[str], log: Path, timeout: float, waiting: Callable[[float], None], every: float = 60
) -> None:
    """Run a client to its end, in a process group of its own.

    Parameters
    ----------
    command
        The whole command line.
    log
        File that takes what the client prints.
    timeout
        Seconds after which the client is killed.
    waiting
        Called every ``every`` seconds with the seconds since the start.
    every
        Seconds between two such calls.

    Raises
    ------
    ServerError
        If the client runs longer than ``timeout`` or ends with a status other than 0.
    """
    started = time.monotonic()
    environment = {**os.environ, "NO_PROXY": HOST, "no_proxy": HOST}
    process: subprocess.Popen[bytes] | None = None
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        while True:
            left = timeout - (time.monotonic() - started)
            try:
                status = process.wait(max(0.0, min(every, left)))
                break
            except subprocess.TimeoutExpired:
                if left <= every:
                    raise ServerError(f"--timeout {timeout:g}: the client was not done by then") from None
                waiting(time.monotonic() - started)
    finally:
        if process is not None:
            _kill_group(process)
    if status:
        raise ServerError(f"the client ended with status {status}:\n{tail(log)}")


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into ``SystemExit`` inside the block, so that what it started is ended."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def port_free(port: int) -> bool:
    """Whether a server could listen on ``port`` of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def some_free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def tail(log: Path) -> str:
    """Return the last lines of a log, each cut to a readable length."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(line[:_TAIL_COLUMNS] for line in lines[-_TAIL_LINES:])


class CpuMeter:
    """CPU that processes other than a server and the clients run beside it use, from its making on (Linux).

    Parameters
    ----------
    server
        A running server.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._start = self._read()

    def others(self) -> float:
        """Share of the machine's CPU time since the start, in [0, 1], that went to other processes."""
        (wall, busy, ours), (wall_then, busy_then, ours_then) = self._read(), self._start
        used = (busy - busy_then) - (ours - ours_then)
        return min(1.0, max(0.0, used / max(wall - wall_then, 1e-9) / (os.cpu_count() or 1)))

    def _read(self) -> tuple[float, float, float]:
        """Seconds: the clock, CPU time of all processes, CPU time of the server's session and of ended clients."""
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        session, ours = self._server.pid, 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == session:
                    ours += sum(map(int, fields[11:15]))
        clients = resource.getrusage(resource.RUSAGE_CHILDREN)
        total = (user + nice + system + irq + softirq + steal) / tick
        return time.monotonic(), total, ours / tick + clients.ru_utime + clients.ru_stime


def machine() -> dict[str, Any]:
    """Describe the hardware without naming the machine: processor, cores, memory in GiB, GPUs."""
    cpu = platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    gpus: list[str] = []
    if (program := shutil.which("nvidia-smi")) is not None:
        query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            gpus = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1), "gpus": gpus}


def versions() -> dict[str, str]:
    """Versions of Python and of the installed distributions that matter."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all it started, and collect it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
