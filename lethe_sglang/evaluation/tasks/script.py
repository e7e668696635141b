"""Running a long script and keeping track of its state."""

from __future__ import annotations

import random
from typing import ClassVar

from lethe_sglang.evaluation.tasks.base import NAMES, Family, Problem, names

PHASE = 12
"""Lines for which a script leans on the same few variables; then it turns to others."""


class Script(Family):
    """Straight-line code over digits modulo 10; the values live in the chain of thought only.

    ``01a=3;02b=4;03c=a+b;?ca`` is run line by line: ``01a=3:A3;02b=4:B4;03c=a+b:A3B4C7;``, and answered by ``C7A3``.
    A line combines one of the last variables with one of the few that the current phase of the script leans on, so
    that some values recur for a while and then no more; the question asks for late variables and a recurring one.
    """

    name: ClassVar[str] = "script"
    longest: ClassVar[int] = 15 * len(NAMES)

    def generate(self, rng: random.Random, tokens: int) -> Problem:
        """See the base class; a line is about 15 tokens."""
        lines = min(max(tokens // 15, 4), len(NAMES))
        keys = names(rng, lines)
        value: dict[str, int] = {}
        code, chain, leaned_on = [], [], keys[:3]
        for i, key in enumerate(keys, 1):
            if i <= 3:
                value[key] = rng.randrange(10)
                line, work = f"{i:02d}{key}={value[key]}", ""
            else:
                if i % PHASE == 0:
                    leaned_on = [rng.choice(leaned_on), *rng.sample(keys[max(i - 9, 0) : i - 1], 2)]
                one, other = rng.choice(keys[max(i - 5, 0) : i - 1]), rng.choice(leaned_on)
                sign = rng.choice("+-")
                value[key] = (value[one] + (value[other] if sign == "+" else -value[other])) % 10
                line, work = f"{i:02d}{key}={one}{sign}{other}", _values(value, (one, other))
            code.append(line)
            chain.append(f"{line}:{work}{_values(value, (key,))};")
        asked = (keys[-1], rng.choice(keys[-4:-1]), rng.choice(leaned_on))
        question = ";".join(code) + ";?" + "".join(asked)
        return Problem(self.name, question, "".join(chain), _values(value, asked))


def _values(value: dict[str, int], keys: tuple[str, ...]) -> str:
    return "".join(f"{key.upper()}{value[key]}" for key in keys)
