"""Running a long script and keeping track of its state."""

from __future__ import annotations

import random
from typing import ClassVar

from lethe_bench.tasks.base import NAMES, Family, Problem, names

PHASE = 12
"""Lines for which a script leans on the same few variables; then it turns to others."""


class Script(Family):
    """Straight-line code over digits modulo 10; the values live in the chain of thought only.

    A line is ``#03a3`` (a is 3) or ``#01cAc'B`` (c is A plus B). ``#03a3;#02b4;#01cAc'B;?CA`` is run line by line,
    with the value behind every name: ``#03a3A3;#02b4B4;#01cA3c'B4C7;``, and answered by ``C7A3``.
    A line combines one of the last variables with one of the few that the current phase of the script leans on, so
    that some values recur for a while and then no more; the question asks for late variables and a recurring one.
    """

    name: ClassVar[str] = "script"
    longest: ClassVar[int] = 10 * len(NAMES)

    def generate(self, rng: random.Random, tokens: int) -> Problem:
        """See the base class; a line is ten tokens."""
        lines = min(max(tokens // 10, 4), len(NAMES))
        keys = names(rng, lines)
        value: dict[str, int] = {}
        code, chain, leaned_on = [], [], keys[:3]
        for i, key in enumerate(keys):
            left = f"#{lines - i:02d}"
            if i < 3:
                value[key] = rng.randrange(10)
                code.append(f"{left}{key}{value[key]}")
                work = code[-1]
            else:
                if i % PHASE == PHASE - 1:
                    leaned_on = [rng.choice(leaned_on), *rng.sample(keys[max(i - 8, 0) : i], 2)]
                one, other = rng.choice(keys[max(i - 4, 0) : i]), rng.choice(leaned_on)
                value[key] = (value[one] + value[other]) % 10
                code.append(f"{left}{key}{one.upper()}{key}'{other.upper()}")
                work = f"{left}{key}{_value(value, one)}{key}'{_value(value, other)}"
            chain.append(f"{work}{_value(value, key)};")
        asked = (keys[-1], rng.choice(keys[-4:-1]), rng.choice(leaned_on))
        question = ";".join(code) + ";?" + "".join(asked).upper()
        return Problem(self.name, question, "".join(chain), "".join(_value(value, key) for key in asked))


def _value(value: dict[str, int], key: str) -> str:
    return f"{key.upper()}{value[key]}"
