"""Intervals and paired tests for accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054
DRAWS = 4000
"""Resamples of a bootstrap and sign flips of a permutation test; both start from a fixed seed."""


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


class Mean(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def pooled_mean(strata: Sequence[Sequence[float]]) -> Mean:
    """Mean over all values, with a bootstrap interval that resamples within each stratum.

    Parameters
    ----------
    strata
        Values in groups whose sizes are fixed (problems of a family). Where a problem was sampled several times, give
        one value per problem, the mean of its samples: problems are what is drawn.

    Raises
    ------
    ValueError
        If there is no value.
    """
    return total_mean([strata])


def total_mean(parts: Sequence[Sequence[Sequence[float]]]) -> Mean:
    """Sum of the means of several parts, each pooled over its strata, with a bootstrap interval of the sum.

    Raises
    ------
    ValueError
        If a part has no value.
    """
    rng, sums, total = np.random.default_rng(0), np.zeros(DRAWS), 0.0
    for part in parts:
        groups = [np.asarray(values, dtype=np.float64) for values in part if len(values)]
        count = sum(map(len, groups))
        if not count:
            raise ValueError("a mean needs at least one value")
        total += float(sum(values.sum() for values in groups)) / count
        for values in groups:
            sums += values[rng.integers(0, len(values), size=(DRAWS, len(values)))].sum(axis=1) / count
    low, high = np.quantile(sums, (0.025, 0.975))
    return Mean(total, float(low), float(high))


def paired_means(strata: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Paired:
    """Compare two arms by their mean per problem, where problems were sampled several times.

    Parameters
    ----------
    strata
        Per group of problems, the values of the first and of the second arm, problem by problem.

    Returns
    -------
    Paired
        The gain with a stratified bootstrap interval; ``wins`` and ``losses`` count problems on which the first arm's
        mean is higher, lower; ``p`` is that of a sign-flip permutation test over problems.

    Raises
    ------
    ValueError
        If two arms do not have the same number of problems, or there is none.
    """
    if any(len(first) != len(second) for first, second in strata):
        raise ValueError("paired arms need the same problems in every group")
    gaps = [[a - b for a, b in zip(first, second, strict=True)] for first, second in strata]
    gain = pooled_mean(gaps)
    flat = np.asarray([gap for group in gaps for gap in group])
    flips = np.random.default_rng(0).integers(0, 2, size=(DRAWS, len(flat))) * 2 - 1
    extreme = int((np.abs(flips @ flat) >= abs(flat.sum()) - 1e-9).sum())
    p = (extreme + 1) / (DRAWS + 1)
    return Paired(gain.mean, gain.low, gain.high, int((flat > 0).sum()), int((flat < 0).sum()), p)
