"""Multi-digit addition with a scratchpad of digits and carries."""

from __future__ import annotations

import random
from typing import ClassVar

from lethe_sglang.evaluation.tasks.base import Family, Problem, names

DIGITS = 3


class Addition(Family):
    """A running total modulo 1000 of named numbers, every number written with its last digit first.

    ``a=352;b=918;?#01a#02b`` asks for 253 + 819. The chain copies each number, adds digit by digit (digit of the
    number, digit of the total, carry in, sum, carry out) and writes the new total:
    ``#01a352:30030,50050,20020,T352;#02b918:93021,15170,82101,T270;``
    """

    name: ClassVar[str] = "addition"

    def generate(self, rng: random.Random, tokens: int) -> Problem:
        """See the base class; an item is 31 tokens."""
        items = min(max(tokens // 31, 1), 99)
        keys = names(rng, rng.randint(3, 9))
        number = {key: f"{rng.randrange(1000):03d}" for key in keys}
        asked = [rng.choice(keys) for _ in range(items)]
        total, chain = "0" * DIGITS, []
        for i, key in enumerate(asked, 1):
            carry, digits, groups = 0, "", ""
            for x, t in zip(number[key], total, strict=True):
                s = int(x) + int(t) + carry
                groups += f"{x}{t}{carry}{s % 10}{s // 10},"
                digits, carry = digits + str(s % 10), s // 10
            total = digits
            chain.append(f"#{i:02d}{key}{number[key]}:{groups}T{total};")
        given = ";".join(f"{key}={number[key]}" for key in keys)
        question = given + ";?" + "".join(f"#{i:02d}{key}" for i, key in enumerate(asked, 1))
        return Problem(self.name, question, "".join(chain), total)
