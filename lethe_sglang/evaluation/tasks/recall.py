"""A fact that the prompt states once and that is needed only at the very end."""

from __future__ import annotations

import random
from typing import ClassVar

from lethe_sglang.evaluation.tasks.base import INDICES, Family, Problem, names
from lethe_sglang.evaluation.tasks.walk import walk


def facts(rng: random.Random) -> tuple[str, str, str]:
    """Return facts (``a'#73b'#08``), the name that is asked for and its fact."""
    keys = names(rng, rng.randint(2, 5))
    value = {key: rng.choice(INDICES) for key in keys}
    asked = rng.choice(keys)
    return "".join(f"{key}'{value[key]}" for key in keys), f"{asked}'", value[asked]


class Recall(Family):
    """A walk; after it the fact of one name: ``a'#73b'#08;aC;cA;?A0#40!b'`` is answered by ``A!b'#08``."""

    name: ClassVar[str] = "recall"

    def generate(self, rng: random.Random, tokens: int) -> Problem:
        """See the base class; a step of the walk is five tokens."""
        stated, asked, fact = facts(rng)
        question, chain, last = walk(rng, max(tokens // 5, 1))
        return Problem(self.name, f"{stated};{question}!{asked}", chain, f"{last}!{asked}{fact}")
