"""Records of a part: one JSON file, rewritten after every record."""

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

ROOT = Path(__file__).parents[2]


class SuiteError(RuntimeError):
    """One line: why nothing can be measured here."""


class Results:
    """Records of one part by their key, on disk after each.

    Parameters
    ----------
    path
        The JSON file; one of the same GPU, versions and commit is taken up.
    header
        What every part says of itself: part, command, date, machine, versions, commit.
    planned
        Keys of all records, in order.
    fresh
        Begin anew.

    Attributes
    ----------
    records
        Record by key, each with a ``status``.
    added
        How many records, or states of one, this call has added.

    Raises
    ------
    SuiteError
        If the file is of another GPU, other versions or another commit.
    """

    def __init__(self, path: Path, header: dict[str, Any], planned: Sequence[str], fresh: bool = False) -> None:
        self.path, self.header, self.planned = path, header, list(planned)
        self.records: dict[str, dict[str, Any]] = {}
        self.added = 0
        if path.is_file() and not fresh:
            old = json.loads(path.read_text(encoding="utf-8"))
            if differing := [name for name in ("gpus", "versions", "commit") if old.get(name) != header[name]]:
                raise SuiteError(f"{path.name} is of other {', '.join(differing)}: give --fresh or another --out")
            self.records = old["records"]

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Take a record and write the file: a kill leaves the old file or the new one, never half of one."""
        self.records[key] = record
        self.added += 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        body = {**self.header, "finished": not self.todo(), "planned": self.planned, "records": self.records}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def todo(self) -> list[str]:
        """Keys without a record, or with one of status ``partial``, in order."""
        return [key for key in self.planned if self.records.get(key, {"status": "partial"})["status"] == "partial"]


def header(part: str, model: str | None, arguments: Sequence[str]) -> dict[str, Any]:
    """Describe a run: part, model, command, date, GPUs, machine, versions, commit."""
    from lethe_sglang.evaluation.servers import machine, versions

    found, git = machine(), ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = None
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    shown = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    return {
        "part": part,
        "command": shlex.join(["bash", "scripts/gpu_suite.sh", *shown]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpus": found.pop("gpus"),
        "machine": found,
        "versions": versions(),
        "commit": commit,
        "model": model,
    }


def say(line: str) -> None:
    """Print progress."""
    print(line, file=sys.stderr, flush=True)
