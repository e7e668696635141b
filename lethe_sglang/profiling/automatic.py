"""The pass that a server runs for itself before it starts, in a process of its own.

``sgl.Engine`` starts servers and sets signal handlers and environment variables; a launcher that is about to start its
own must have none of it. The process is this module: it takes a pickled ``Pass`` on standard input.
"""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lethe_sglang.config import ConfigError
from lethe_sglang.processes import ending_on_signals, kill_group
from lethe_sglang.profiling.run import Pass, measure

logger = logging.getLogger("lethe_sglang")

MEASURING_SECONDS = 240
"""Prompts that start later are left out of an automatic pass."""

LONGEST_SECONDS = 1800
"""An automatic pass, the model's loading included, that takes longer is given up."""

CARRIED = (
    "tokenizer_path",
    "tokenizer_mode",
    "load_format",
    "model_loader_extra_config",
    "trust_remote_code",
    "revision",
    "json_model_override_args",
    "context_length",
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "download_dir",
    "device",
    "base_gpu_id",
    "gpu_id_step",
    "tp_size",
    "mem_fraction_static",
    "max_total_tokens",
    "page_size",
)
"""Server arguments of a pass: what decides which model runs, how, and where. It measures on torch_native alone."""


def request(server_args: Any, path: Path) -> Pass:
    """Return the pass for a server with these arguments, which writes its profile to ``path``."""
    words: list[str] = []
    for name in CARRIED:
        flag, value = f"--{name.replace('_', '-')}", getattr(server_args, name, None)
        if value is True:
            words.append(flag)
        elif value not in (None, False, "", {}):
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return Pass(
        model_path=str(server_args.model_path), out=path, time_limit=MEASURING_SECONDS, server_args=tuple(words)
    )


def run(server_args: Any, path: Path) -> None:
    """Run the pass in a process of its own; its progress goes to this process's standard error.

    Raises
    ------
    ConfigError
        If it fails, takes too long, or the server spans several nodes.
    """
    otherwise = "run lethe profile yourself and give its file to --kv-evict-profile, or set --kv-evict-profile none"
    if server_args.nnodes > 1:
        raise ConfigError(f"budget.profile auto: does not measure over several nodes; {otherwise}")
    logger.info("KV eviction: no profile of this model yet; measuring it once before the server starts")
    words = [sys.executable, "-m", "lethe_sglang.profiling.automatic"]
    status = run_to_end(words, LONGEST_SECONDS, pickle.dumps(request(server_args, path)))
    if status is None:
        raise ConfigError(f"budget.profile auto: the pass took more than {LONGEST_SECONDS} s; {otherwise}")
    if status:
        raise ConfigError(f"budget.profile auto: lethe profile failed (status {status}, see above); {otherwise}")


def run_to_end(words: Sequence[str], seconds: float, given: bytes = b"") -> int | None:
    """Run a command with ``given`` on its standard input; nothing of it survives this call.

    Returns
    -------
    int or None
        The exit status; None after ``seconds``.
    """
    process: subprocess.Popen[bytes] | None = None
    with ending_on_signals():
        try:
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
            process.communicate(given, seconds)
            return process.returncode
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process is not None:
                kill_group(process)


def main() -> int:
    """Measure what standard input asks for; an error is one line on standard error and status 2."""
    try:
        measure(pickle.load(sys.stdin.buffer))
    except ConfigError as error:
        print(f"lethe profile: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
