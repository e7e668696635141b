"""A progress bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from typing import TextIO

BAR = 30
SECONDS_BETWEEN_LINES = 10


class Progress:
    """Shows how many of ``total`` things are done.

    Parameters
    ----------
    total
        Things in all.
    out
        Where to write; a terminal gets a bar in place, anything else lines.
    what
        What is counted.
    """

    def __init__(self, total: int, out: TextIO, what: str = "prompts") -> None:
        self.total, self.out, self.what = total, out, what
        self.started = time.monotonic()
        self._written = 0.0
        self._bar = out.isatty()

    def show(self, done: int, note: str = "") -> None:
        """Show that ``done`` of them are done; in a log only now and then, and at the end."""
        now = time.monotonic()
        if not self._bar and now - self._written < SECONDS_BETWEEN_LINES and done < self.total:
            return
        self._written = now
        filled = BAR * done // max(self.total, 1)
        bar = f"[{'#' * filled}{'.' * (BAR - filled)}] " if self._bar else ""
        line = f"lethe profile: {bar}{done} of {self.total} {self.what}, {now - self.started:.0f} s{note}"
        self.out.write(f"\r{line}\x1b[K" if self._bar else f"{line}\n")
        self.out.flush()

    def end(self) -> None:
        """Leave the bar's line."""
        if self._bar and self._written:
            self.out.write("\n")
            self.out.flush()
