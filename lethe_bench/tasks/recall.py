"""A fact that the prompt states once and that is needed only at the very end."""

from __future__ import annotations

import random
from typing import ClassVar

from lethe_bench.tasks.base import NAMES, Family, Problem
from lethe_bench.tasks.walk import walk


def facts(rng: random.Random, taken: str = "") -> tuple[str, str, str]:
    """Return facts of names that are not taken (``a'7A3b'0B8``), the one that is asked for and what it says."""
    keys = rng.sample([name for name in NAMES if name not in taken.lower()], rng.randint(2, 5))
    fact = {key: f"{key}'{rng.randrange(10)}{key.upper()}{rng.randrange(10)}" for key in keys}
    asked = rng.choice(keys)
    return "".join(fact.values()), f"{asked}'", fact[asked]


class Recall(Family):
    """A walk; after it the fact of one name: ``a'7A3b'0B8;aC;cA;?A0#40!b'`` is answered by ``A!b'0B8``."""

    name: ClassVar[str] = "recall"

    def generate(self, rng: random.Random, tokens: int) -> Problem:
        """See the base class; a step of the walk is five tokens."""
        stated, asked, fact = facts(rng)
        question, chain, last = walk(rng, max(tokens // 5, 1))
        return Problem(self.name, f"{stated};{question}!{asked}", chain, f"{last}!{fact}")
