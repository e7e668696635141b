"""Run a program whose output nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys


def closed(*arguments: str, both: bool = False, **environment: str) -> tuple[int, str]:
    """Run ``lethe`` with its output (``both``: and its errors) in a pipe that has no reader any more.

    Returns
    -------
    tuple
        Exit status, and what it wrote to standard error.
    """
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lethe_sglang.cli.main", *arguments],
            stdout=writer,
            stderr=writer if both else subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "", **environment},
            timeout=120,
            check=False,
        )
    finally:
        os.close(writer)
    return done.returncode, "" if both else done.stderr.decode()
