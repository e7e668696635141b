"""Records of a part on disk: a JSON line each, below a line that says what they are of."""

from __future__ import annotations

import contextlib
import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lethe_bench.machine import machine, versions
from lethe_sglang.config import ConfigError
from lethe_sglang.files import Journal


class Results:
    """Records of one part by their key, on disk after each.

    Parameters
    ----------
    path
        The file; one of the same GPU, versions and commit is taken up.
    header
        What :func:`header` returns.
    fresh
        Begin anew.

    Attributes
    ----------
    records
        Record by key, each with a ``status``.

    Raises
    ------
    ConfigError
        If the file is of another GPU, other versions or another commit.
    """

    def __init__(self, path: Path, header: dict[str, Any], fresh: bool = False) -> None:
        self.header, self.records, self._journal = header, dict[str, dict[str, Any]](), Journal(path)
        lines = [] if fresh else self._journal.read()
        if lines:
            old = lines[0]
            if differing := [name for name in ("gpus", "versions", "commit") if old.get(name) != header[name]]:
                raise ConfigError(f"{path}: is of other {', '.join(differing)}; give --fresh or another --out")
            self.header, self.records = old, {line.pop("key"): line for line in lines[1:]}
        self._begun = bool(lines)

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Take a record and write it down."""
        if not self._begun:
            self._journal.start([self.header])
            self._begun = True
        self.records[key] = record
        self._journal.add([{"key": key, **record}])
        print(f"{key}: {json.dumps(record)}", file=sys.stderr, flush=True)


def header(part: str, planned: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
    """Describe a part's results: keys of all records, command, date, GPUs, machine, versions, commit."""
    found, git = machine(), ["git", "-C", str(Path(__file__).parents[2]), "rev-parse", "--short", "HEAD"]
    commit = None
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    shown = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    return {
        "part": part,
        "command": shlex.join(["lethe", "gpu", *shown]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpus": found.pop("gpus"),
        "machine": found,
        "versions": versions(),
        "commit": commit,
        "planned": list(planned),
    }
