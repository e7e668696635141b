"""Families of reasoning problems, one file each."""

from __future__ import annotations

import random

from lethe_bench.tasks.addition import Addition
from lethe_bench.tasks.base import (
    END_THINK,
    INDICES,
    NAMES,
    PUNCTUATION,
    RESULTS,
    THINK,
    TOKEN_PATTERN,
    Family,
    Problem,
    tokens_of,
)
from lethe_bench.tasks.chain import Chain
from lethe_bench.tasks.mixed import Mixed
from lethe_bench.tasks.recall import Recall
from lethe_bench.tasks.script import Script
from lethe_bench.tasks.walk import Walk

FAMILIES: dict[str, Family] = {f.name: f for f in (Chain(), Walk(), Addition(), Script(), Recall(), Mixed())}
TRAINED: tuple[str, ...] = tuple(name for name, family in FAMILIES.items() if not family.held_out)

__all__ = [
    "END_THINK",
    "FAMILIES",
    "INDICES",
    "NAMES",
    "PUNCTUATION",
    "RESULTS",
    "THINK",
    "TOKEN_PATTERN",
    "TRAINED",
    "Family",
    "Problem",
    "problem",
    "tokens_of",
]


def problem(family: str, split: str, index: int, tokens: tuple[int, int] = (200, 800)) -> Problem:
    """Return problem number ``index`` of a family in a split of its own.

    Parameters
    ----------
    family
        A key of ``FAMILIES``.
    split
        Names a range of seeds: ``train``, ``tune`` and ``test`` share no problem but by chance.
    index
        Number of the problem.
    tokens
        Range of chain-of-thought lengths, clipped to what the family allows.
    """
    rng = random.Random(f"{split}/{family}/{index}")
    kind = FAMILIES[family]
    low, high = (min(max(n, kind.shortest), kind.longest) for n in tokens)
    return kind.generate(rng, rng.randint(low, high))
