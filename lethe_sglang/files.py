"""Files that other processes read while they are written, and that a killed process leaves behind in a usable state.

This is a leaf: it imports nothing of ours, so that the product and the laboratory write in the same way.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step: a reader sees the old file or the whole new one.

    Raises
    ------
    OSError
        If the directory cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with draft.open("x", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


class Journal:
    """Records that are kept one by one, a JSON line each, by a job that goes on where it was killed.

    Parameters
    ----------
    path
        The file; its directory is made when the first record is kept.
    header
        What the records are of: the file's first line. None keeps records alone.
    """

    def __init__(self, path: Path, header: dict[str, Any] | None = None) -> None:
        self.path, self.header = path, header

    def read(self) -> list[dict[str, Any]]:
        """Return the whole lines, the header apart; those that a kill tore are left out.

        A file below another header holds nothing of this job, so nothing is returned.
        """
        lines = read_lines(self.path)
        if self.header is None:
            return lines
        return lines[1:] if lines[:1] == [self.header] else []

    def start(self, records: Sequence[dict[str, Any]] = ()) -> None:
        """Write the file anew, with what is done already."""
        first = [] if self.header is None else [self.header]
        write_atomically(self.path, _text([*first, *records]))

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Append records in one write; a line that a kill tore is cut off first."""
        if not records:
            return
        if self.header is not None and not self.path.exists():
            self.start()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            if (size := file.seek(0, os.SEEK_END)) and os.pread(file.fileno(), 1, size - 1) != b"\n":
                file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
            file.write(_text(records).encode())

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines without the torn line that a kill may have left; nothing if there is no file.

    Raises
    ------
    ValueError
        If a line before the last one is no JSON: that is damage, not an interruption.
    """
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def _text(records: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
