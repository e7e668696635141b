"""Multi-digit addition with a scratchpad of digits and carries."""

from __future__ import annotations

import random
from typing import ClassVar

from lethe_bench.tasks.base import Family, Problem, names, tokens_of


class Addition(Family):
    """A running total modulo 1000 of named numbers.

    The last digit of a number is kept under ``a``, the one before under ``A``, the first under ``a'``:
    ``a3A5a'2;b9B1b'8;?#02a#01b`` asks for 253 + 819. The chain goes through each number digit by digit (digit of the
    number, digit of the total, their sum with the carry, carry): ``#02a3030A5050a'2020;#01b9321B1570b'8201;``, and
    the answer is the total in the order of the digits: ``270``.
    """

    name: ClassVar[str] = "addition"

    def generate(self, rng: random.Random, tokens: int) -> Problem:
        """See the base class; a number is 17 tokens."""
        items = min(max(tokens // 17, 1), 99)
        keys = names(rng, rng.randint(3, 9))
        number = {key: rng.randrange(1000) for key in keys}
        asked = [rng.choice(keys) for _ in range(items)]
        total, chain = [0, 0, 0], []
        for left, key in zip(range(items, 0, -1), asked, strict=True):
            carry, groups = 0, ""
            for place, label in enumerate(_labels(key)):
                x, t = number[key] // 10**place % 10, total[place]
                carry, total[place] = divmod(x + t + carry, 10)
                groups += f"{label}{x}{t}{total[place]}{carry}"
            chain.append(f"#{left:02d}{groups};")
        given = ";".join(
            "".join(f"{label}{number[key] // 10**place % 10}" for place, label in enumerate(_labels(key)))
            for key in keys
        )
        question = f"{given};?" + "".join(
            f"#{left:02d}{key}" for left, key in zip(range(items, 0, -1), asked, strict=True)
        )
        return Problem(self.name, question, "".join(chain), "".join(map(str, total)))


def _labels(key: str) -> list[str]:
    return tokens_of(f"{key}{key.upper()}{key}'")
