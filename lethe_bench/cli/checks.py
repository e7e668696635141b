"""What several commands check before a server starts, and how they report progress."""

from __future__ import annotations

import sys
from pathlib import Path

from lethe_bench.servers import port_free, some_free_port
from lethe_sglang.config import ConfigError


def check_model(model_path: str, option: str, instead: str = "") -> None:
    """Refuse a model that is neither a directory with a config.json nor a name on a hub.

    Raises
    ------
    ConfigError
        With one line that names the ``option`` and, behind a legal value, what else to do ``instead``.
    """
    path = Path(model_path)
    on_a_hub = not model_path.startswith(("/", ".", "~")) and model_path.count("/") <= 1
    if path.is_dir() != (path / "config.json").is_file() or not (path.is_dir() or on_a_hub):
        raise ConfigError(f"{option} {model_path}: no model there; give a directory with a config.json{instead}")


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
