"""A fact that the prompt states once and that is needed only at the very end."""

from __future__ import annotations

import random
from typing import ClassVar

from lethe_sglang.evaluation.tasks.base import Family, Problem, names
from lethe_sglang.evaluation.tasks.walk import walk


def facts(rng: random.Random) -> tuple[str, str, str]:
    """Return facts (``!a73!b08``), the name that is asked for and its fact."""
    keys = names(rng, rng.randint(2, 5))
    value = {key: f"{rng.randrange(100):02d}" for key in keys}
    asked = rng.choice(keys)
    return "".join(f"!{key}{value[key]}" for key in keys), asked, value[asked]


class Recall(Family):
    """A walk; after it the fact of one name: ``!a73!b08;a>c;c>a;?a040!b`` is answered by ``a!b08``."""

    name: ClassVar[str] = "recall"

    def generate(self, rng: random.Random, tokens: int) -> Problem:
        """See the base class."""
        steps = max(tokens // 7, 1)
        stated, asked, fact = facts(rng)
        edges, start, chain, last = walk(rng, steps)
        question = f"{stated};{edges};?{start}{steps:03d}!{asked}"
        return Problem(self.name, question, chain, f"{last}!{asked}{fact}")
