"""Resolving shuffled variable definitions."""

from __future__ import annotations

import random
from typing import ClassVar

from lethe_sglang.evaluation.tasks.base import Family, Problem, names


def chain(rng: random.Random, tokens: int) -> tuple[str, str, str]:
    """Return a question (definitions and the names asked for), its chain of thought and the answer."""
    keys = names(rng, rng.randint(6, 18))
    rule: dict[str, tuple[str, int]] = {}
    value: dict[str, int] = {}
    depth: dict[str, int] = {}
    for i, key in enumerate(keys):
        add = rng.randrange(10)
        base = "" if i == 0 or rng.random() < 0.2 else rng.choice(keys[max(i - 4, 0) : i])
        rule[key] = (base, add)
        value[key] = (value.get(base, 0) + add) % 10
        depth[key] = depth.get(base, 0) + 1
    asked: list[str] = []
    length = 0
    for key in rng.sample(keys, min(len(keys), 9)):
        cost = 9 * depth[key] + 3 + 2 * len(asked)
        if length + cost <= tokens or not asked:
            asked.append(key)
            length += cost
    written = {key: f"{key}={base}+{add}" if base else f"{key}={add}" for key, (base, add) in rule.items()}
    steps, found = [], ""
    for i, key in enumerate(asked, 1):
        stack = [key]
        while rule[stack[-1]][0]:
            stack.append(rule[stack[-1]][0])
        found += f"{key.upper()}{value[key]}"
        unwound = ",".join(f"{k.upper()}{value[k]}" for k in reversed(stack))
        steps.append(f"#{i}" + ",".join(written[k] for k in stack) + f":{unwound}.{found};")
    given = ";".join(written[key] for key in rng.sample(keys, len(keys)))
    return given + ";?" + "".join(f"#{i}{key}" for i, key in enumerate(asked, 1)), "".join(steps), found


class Chain(Family):
    """``c=a+5;a=7;b=c+2;?#1b#2a`` asks for b and a, sums modulo 10.

    The chain follows each name down to a number and comes back up, then writes what has been found so far:
    ``#1b=c+2,c=a+5,a=7:A7,C2,B4.B4;#2a=7:A7.B4A7;``, and the answer is ``B4A7``.
    """

    name: ClassVar[str] = "chain"
    longest: ClassVar[int] = 600

    def generate(self, rng: random.Random, tokens: int) -> Problem:
        """See the base class."""
        return Problem(self.name, *chain(rng, tokens))
