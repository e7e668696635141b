"""What several commands check before a server starts, and how they report progress."""

from __future__ import annotations

import sys

from lethe_bench.servers import port_free, some_free_port
from lethe_sglang.config import ConfigError


def check_ports(first: int, count: int = 1) -> None:
    """Refuse ports of which one is not free.

    Raises
    ------
    ConfigError
        With one line that names a free port.
    """
    for port in range(first, first + count):
        if port > 65535 or not port_free(port):
            raise ConfigError(f"--port {first}: {port} is in use; give another, such as --port {some_free_port()}")


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)
