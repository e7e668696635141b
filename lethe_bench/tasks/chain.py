"""Resolving shuffled variable definitions."""

from __future__ import annotations

import random
from typing import ClassVar

from lethe_bench.tasks.base import RESULTS, Family, Problem, names


def chain(rng: random.Random, tokens: int) -> tuple[str, str, str]:
    """Return a question (definitions and the names asked for), its chain of thought and the answer."""
    keys = names(rng, rng.randint(6, 18))
    rule: dict[str, tuple[str, int]] = {}
    depth: dict[str, int] = {}
    for i, key in enumerate(keys):
        base = "." if i == 0 or rng.random() < 0.2 else rng.choice(keys[max(i - 4, 0) : i])
        rule[key] = (base, rng.randrange(10))
        depth[key] = depth.get(base, 0) + 1
    asked: list[str] = []
    length = 0
    for key in rng.sample(keys, min(len(keys), len(RESULTS))):
        cost = 7 * depth[key] + 5 + 2 * len(asked)
        if length + cost <= tokens or not asked:
            asked.append(key)
            length += cost
    written = {key: f"{key}{base.upper()}{key}'{add}" for key, (base, add) in rule.items()}
    steps, found = [], ""
    for left, key in zip(range(len(asked), 0, -1), asked, strict=True):
        total, work, name = 0, [], key
        while name != ".":
            total = (total + rule[name][1]) % 10
            work.append(f"{written[name]}={total}")
            name = rule[name][0]
        found += f"!{left}{total}"
        steps.append(f"#{left:02d}=0," + ",".join(work) + f";{found}")
    given = ";".join(written[key] for key in rng.sample(keys, len(keys)))
    wanted = "".join(f"#{left:02d}{key}" for left, key in zip(range(len(asked), 0, -1), asked, strict=True))
    return f"{given};?{wanted}", "".join(steps), found


class Chain(Family):
    """``cAc'5;a.a'7;bCb'2;?#02b#01a`` asks for b and a, sums modulo 10; ``cAc'5`` says that c is A plus 5.

    The chain follows each name down to one that rests on nothing (``.``), adding up on the way, and then writes what
    has been found so far: ``#02=0,bCb'2=2,cAc'5=7,a.a'7=4;!24#01=0,a.a'7=7;!24!17``. The answer is ``!24!17``.
    """

    name: ClassVar[str] = "chain"
    longest: ClassVar[int] = 600

    def generate(self, rng: random.Random, tokens: int) -> Problem:
        """See the base class."""
        return Problem(self.name, *chain(rng, tokens))
