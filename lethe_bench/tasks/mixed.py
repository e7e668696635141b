"""Held out of training: definitions to resolve, and a fact that is needed at the very end."""

from __future__ import annotations

import random
from typing import ClassVar

from lethe_bench.tasks.base import Family, Problem
from lethe_bench.tasks.chain import chain
from lethe_bench.tasks.recall import facts


class Mixed(Family):
    """Like ``chain``, with the facts of ``recall`` in front: the reasoner has seen both, never together."""

    name: ClassVar[str] = "mixed"
    held_out: ClassVar[bool] = True
    longest: ClassVar[int] = 600

    def generate(self, rng: random.Random, tokens: int) -> Problem:
        """See the base class."""
        question, thinking, answer = chain(rng, tokens)
        stated, asked, fact = facts(rng, taken=question)
        return Problem(self.name, f"{stated};{question}!{asked}", thinking, f"{answer}!{fact}")
