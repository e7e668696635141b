"""SGLang servers and clients as processes that are gone when their block is left."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lethe_sglang.processes import kill_group

HOST = "127.0.0.1"
READY_SECONDS = 900
"""Longest start of a server: a first start on a GPU compiles kernels and captures graphs."""

GRACE_SECONDS = 20
"""Time a server gets to end by itself before its processes are killed."""

_TAIL_LINES, _TAIL_COLUMNS = 20, 240


def launch_command(model_path: str, port: int, *more: str) -> list[str]:
    """Command line of a server on a port of 127.0.0.1, with more arguments behind what all servers have."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model_path, "--host", HOST]
    return [*command, "--port", str(port), "--log-level", "info", "--sleep-on-idle", *more]


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
    ready_within
        Longest time that a ``with`` block waits for it, in seconds.

    Examples
    --------
    >>> with Server(command, 31000, Path("server.log")) as server:  # doctest: +SKIP
    ...     server.get("/server_info")
    """

    def __init__(self, command: Sequence[str], port: int, log: Path, environment: dict[str, str] | None = None) -> None:
        self.command, self.port, self.log = list(command), port, log
        self.environment = {**os.environ, "NO_PROXY": HOST, "no_proxy": HOST, **(environment or {})}
        self.ready_seconds = self._started = 0.0
        self.ready_within: float = READY_SECONDS
        self._process: subprocess.Popen[bytes] | None = None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> Server:
        """Start the server and wait until it is healthy, as :meth:`wait` does."""
        try:
            self.start()
            self.wait(self.ready_within)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all processes of the server."""
        self.stop()

    def start(self) -> None:
        """Start the server and return at once; whoever calls this calls :meth:`stop`."""
        self._started = time.monotonic()
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )

    def wait(self, seconds: float = READY_SECONDS) -> None:
        """Wait until the server is healthy.

        Raises
        ------
        ServerError
            If it ends, or is not healthy within so many seconds of its start.
        """
        while not self._healthy():
            if (status := self.status) is not None:
                raise ServerError(f"the server ended with status {status} before it was ready:\n{tail(self.log)}")
            if time.monotonic() - self._started > seconds:
                raise ServerError(f"the server was not ready after {seconds:g} s:\n{tail(self.log)}")
            time.sleep(0.1)
        self.ready_seconds = time.monotonic() - self._started

    @property
    def url(self) -> str:
        """Address without a path."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Number of the first process, which is that of the session of all of them."""
        return self._running.pid

    @property
    def status(self) -> int | None:
        """Exit status of the first process, None while it runs."""
        return self._running.poll()

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError("the server is not running")
        return self._process

    def get(self, path: str, timeout: float = 60) -> Any:
        """Return the JSON answer to a GET request."""
        with self._opener.open(f"{self.url}{path}", timeout=timeout) as reply:
            return json.load(reply)

    def post(self, path: str, body: dict[str, Any], timeout: float = 600) -> str:
        """Return the text of the answer to a POST request with a JSON body."""
        with self._open(path, body, timeout) as reply:
            return str(reply.read().decode())

    def stream(self, path: str, body: dict[str, Any], timeout: float = 600) -> Generator[dict[str, Any], None, None]:
        """Yield the events of a streamed answer to a POST request with a JSON body, as they come."""
        with self._open(path, body, timeout) as reply:
            for line in reply:
                data = line.decode().removeprefix("data:").strip()
                if data and data != "[DONE]":
                    yield json.loads(data)

    def _open(self, path: str, body: dict[str, Any], timeout: float) -> Any:
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", data=json.dumps(body).encode(), headers=headers)
        return self._opener.open(request, timeout=timeout)

    def stop(self, grace: float = GRACE_SECONDS) -> None:
        """End all processes of the server and wait until its port is free; without effect the second time.

        It gets ``grace`` seconds to end by itself; with 0 it is killed at once.
        """
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if grace:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
        finally:
            kill_group(process)
        deadline = time.monotonic() + GRACE_SECONDS
        while not port_free(self.port) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError), self._opener.open(f"{self.url}/health", timeout=10) as reply:
            return bool(reply.status == 200)
        return False


@contextlib.contextmanager
def explained(server: Server) -> Iterator[None]:
    """Turn what goes wrong between a client and a server inside the block into an error that says why.

    Raises
    ------
    ServerError
        If the server refuses a request, does not answer, or is gone.
    """
    try:
        yield
    except urllib.error.HTTPError as error:
        answer = error.read().decode(errors="replace")[:500]
        raise ServerError(f"the server refused {error.url}: {answer}") from None
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"the server is gone ({error}); its last lines:\n{tail(server.log)}") from None


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
            kill_group(process)
    if status:
        raise ServerError(f"the client ended with status {status}:\n{tail(log)}")


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
