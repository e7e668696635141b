"""Points at which kernels are timed."""

from __future__ import annotations

import math
from typing import NamedTuple

BUDGET, INTERVAL, RECENT = 1024, 128, 0.3
"""Of the plugin's defaults: tokens kept, tokens between two rounds, share of the recent window."""

BATCHES, KEPTS, PREFIXES = (1, 16, 64, 256), (1024, 512, 4096), (0, 4096, 32768)

ROUND = ("repack", "select", "places", "likeness")
"""Kernels of a round that can run twice; those that change its bookkeeping cannot."""


class Point(NamedTuple):
    """One point of the grid; what a kernel does not depend on is 0.

    Attributes
    ----------
    kernel
        A key of ``launches.MAKERS``.
    batch
        Requests.
    kept, prefix
        Own tokens and shared tokens of each request.
    """

    kernel: str
    batch: int
    kept: int = 0
    prefix: int = 0

    @property
    def key(self) -> str:
        """As the records name it."""
        return f"{self.kernel} batch={self.batch} kept={self.kept} prefix={self.prefix}"

    @property
    def tail(self) -> int:
        """Tokens of the recent window."""
        return math.ceil(self.kept * RECENT)

    @property
    def packed(self) -> int:
        """Own tokens before the recent window."""
        return self.kept - self.tail

    @property
    def length(self) -> int:
        """Tokens of a list."""
        return self.prefix + self.kept

    @property
    def candidates(self) -> int:
        """Cells that a round of the request chooses from: those packed before, and those that leave the window."""
        return self.packed + INTERVAL

    @property
    def tries(self) -> bool:
        """Whether configurations that servers do not take are timed beside the one that they take."""
        return self.prefix == 0 and self.kept in (0, BUDGET)


def points() -> list[Point]:
    """Return the grid, what the goals need first."""
    first, *others = [
        [Point(kernel, b, k, p) for k in KEPTS for b in BATCHES for kernel in ("score", "attention", "indices")]
        for p in PREFIXES
    ]
    rounds = [Point(kernel, b, k) for k in KEPTS for b in BATCHES for kernel in ROUND]
    small = [Point(kernel, b) for b in BATCHES for kernel in ("zero", "schedule")]
    fp8 = [Point("score-fp8", b, k) for k in KEPTS for b in BATCHES]
    return [*first, *rounds, Point("round", 64, BUDGET), *small, *fp8, *(point for more in others for point in more)]
