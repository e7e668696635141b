"""Files that other processes read while they are written, and that a killed process leaves behind in a usable state.

This is a leaf: it imports nothing of ours, so that the product and the laboratory write in the same way.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text in one step; see :func:`replacing`."""
    with replacing(path) as out:
        out.write(text.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Replace a file's content in one step: a reader sees the old file or the whole new one.

    Raises
    ------
    OSError
        If the directory cannot be written to, or has no room; nothing is left there then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with draft.open("xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def cache_folder(name: str) -> Path:
    """Return a folder of ours in the user's cache directory, as the XDG base directories define it.

    Raises
    ------
    OSError
        If the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lethe-sglang" / name
    except RuntimeError as error:
        raise FileNotFoundError(2, str(error)) from None


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
        """Append records; a line that a kill tore is cut off first.

        Raises
        ------
        OSError
            If there is no room, or nothing may be written; what was there stays, and nothing is added to it.
        """
        if not records:
            return
        if self.header is not None and not self.path.exists():
            self.start()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            if (size := file.seek(0, os.SEEK_END)) and os.pread(file.fileno(), 1, size - 1) != b"\n":
                file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
            end, data = file.seek(0, os.SEEK_END), memoryview(_text(records).encode())
            try:
                while data:  # the last room of a disk takes a part of it, and says so only when asked again
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(end)
                raise

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
