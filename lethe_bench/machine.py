"""The machine that something is measured on: its hardware, what is installed, and who else uses it meanwhile."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from lethe_bench.servers import Server

_DISTRIBUTIONS = ("lethe-sglang", "lethe-cpu", "sglang", "torch", "transformers", "triton", "flashinfer-python")


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


def model_name(model_path: str) -> str:
    """Return a model's name without the directories of this machine above it."""
    path = Path(model_path)
    return path.resolve().name if path.is_dir() or path.is_absolute() else model_path


def readable(command: Iterable[str], model_path: str) -> list[str]:
    """Return a command line without the paths of this machine."""
    names = {sys.executable: "python", model_path: model_name(model_path)}
    return [names.get(word, Path(word).name if Path(word).is_absolute() else word) for word in command]


class CpuMeter:
    """CPU that a server uses, and processes other than it and the clients run beside it, from its making on (Linux).

    Parameters
    ----------
    server
        A running server.
    itself
        Whether this process is a client, too, and not one of the others.
    """

    def __init__(self, server: Server, itself: bool = False) -> None:
        self._server, self._itself = server, itself
        self._start = self._read()

    def others(self) -> float:
        """Share of the machine's CPU time since the start, in [0, 1], that went to other processes."""
        wall, busy, server, clients = self._since()
        return min(1.0, max(0.0, (busy - server - clients) / max(wall, 1e-9) / (os.cpu_count() or 1)))

    def server(self) -> float:
        """CPU time of the server's processes since the start (s): unlike the clock, it does not run while they wait."""
        return self._since()[2]

    def _since(self) -> tuple[float, ...]:
        return tuple(now - then for now, then in zip(self._read(), self._start, strict=True))

    def _read(self) -> tuple[float, float, float, float]:
        """Seconds: the clock; CPU time of all processes, of the server's session, of clients (ended, and itself)."""
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        session, ours = self._server.pid, 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == session:
                    ours += sum(map(int, fields[11:15]))
        clients = [resource.getrusage(resource.RUSAGE_CHILDREN)]
        if self._itself:
            clients.append(resource.getrusage(resource.RUSAGE_SELF))
        total = (user + nice + system + irq + softirq + steal) / tick
        return time.monotonic(), total, ours / tick, sum(used.ru_utime + used.ru_stime for used in clients)
