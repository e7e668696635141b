"""Intervals and paired tests for accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959963984540054


def wilson(right: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    Parameters
    ----------
    right, total
        Successes and trials, ``0 <= right <= total``, ``total >= 1``.
    z
        Normal quantile; 1.96 gives 95 %.

    Raises
    ------
    ValueError
        If the counts are not those of a proportion.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"{right} of {total} is no proportion")
    p = right / total
    scale = 1 + z * z / total
    centre = (p + z * z / (2 * total)) / scale
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / scale
    return (0.0 if right == 0 else max(centre - half, 0.0), 1.0 if right == total else min(centre + half, 1.0))


class Paired(NamedTuple):
    """Two arms on the same problems.

    Attributes
    ----------
    gain
        Accuracy of the first less that of the second.
    low, high
        95 % interval of the gain (normal approximation of paired differences).
    wins, losses
        Problems that only the first, only the second solved.
    p
        Two-sided exact McNemar test: the chance of a split at least this uneven if neither is better.
    """

    gain: float
    low: float
    high: float
    wins: int
    losses: int
    p: float


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compare two arms problem by problem.

    Raises
    ------
    ValueError
        If they do not have the same number of problems, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"paired arms need the same problems, got {len(first)} and {len(second)}")
    n = len(first)
    wins = sum(a and not b for a, b in zip(first, second, strict=True))
    losses = sum(b and not a for a, b in zip(first, second, strict=True))
    gain = (wins - losses) / n
    spread = math.sqrt(max((wins + losses) / n - gain * gain, 0.0) / n)
    return Paired(gain, gain - Z95 * spread, gain + Z95 * spread, wins, losses, mcnemar(wins, losses))


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact McNemar (sign) test on discordant pairs."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return float(min(1.0, 2 * tail / 2**n))
