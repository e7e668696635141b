"""Points at which kernels are timed."""

from __future__ import annotations

from typing import NamedTuple

BUDGET, INTERVAL, RECENT = 1024, 128, 0.3
"""Of the plugin's defaults: tokens kept, tokens between two rounds, share of the recent window."""

BATCHES, KEPTS, PREFIXES = (1, 16, 64, 256), (1024, 512, 4096), (0, 4096, 32768)

STEP, ROUND = ("score", "score-fp8", "indices", "zero", "schedule"), ("repack", "select", "places", "likeness")
"""Kernels of a decode step and of a round; those that change a round's bookkeeping cannot run twice."""


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
        return int(self.kept * RECENT)

    @property
    def packed(self) -> int:
        """Own tokens before the recent window."""
        return self.kept - self.tail

    @property
    def length(self) -> int:
        """Tokens of a list."""
        return self.prefix + self.kept

    @property
    def tuned_at(self) -> Point:
        """The point whose configuration search serves this one: score and lists share theirs over lengths."""
        return Point(self.kernel, self.batch, BUDGET) if self.kernel in ("score", "score-fp8", "indices") else self


def searched() -> list[Point]:
    """Return the points at which servers' configurations are searched: each power of two of requests."""
    return [Point(kernel, 2**n, BUDGET) for kernel in (*STEP, *ROUND) for n in range(10)]


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
