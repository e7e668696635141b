"""What a family of reasoning problems is, and the alphabet that all of them share."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

LATIN = "abcdefghijklmnopqrstuvwxyz"
GREEK = "αβγδεζηθικλμνξοπρστυφχψω"
NAMES = LATIN + GREEK
"""Names of variables and nodes. A name has three forms (``a``, ``A``, ``a'``), for three roles."""
PUNCTUATION = "=;?,.!"
INDICES = tuple(f"#{i:02d}" for i in range(100))
"""Counters, one token each; chains count down, so that they know when to end."""
RESULTS = tuple(f"!{i}" for i in range(1, 10))
"""Labels of results."""
THINK, END_THINK = "<think>", "</think>"
TOKEN_PATTERN = r"<[a-z]{3}>|</?think>|#\d\d|![1-9]|\w'|\S"
"""What is one token of the reasoner."""


class Problem(NamedTuple):
    """One problem: what the user asks, how to think, what to answer."""

    family: str
    question: str
    thinking: str
    answer: str


class Family(ABC):
    """A family of problems: its generator, its verifier and its knob, the length of the chain of thought."""

    name: ClassVar[str]
    held_out: ClassVar[bool] = False
    shortest: ClassVar[int] = 40
    """Shortest chain of thought (tokens) worth asking for."""
    longest: ClassVar[int] = 2000
    """Longest chain of thought (tokens) that the family's alphabet allows."""

    @abstractmethod
    def generate(self, rng: random.Random, tokens: int) -> Problem:
        """Make a problem.

        Parameters
        ----------
        rng
            Source of everything that varies.
        tokens
            About how long the reference chain of thought is.
        """
        ...

    def verify(self, problem: Problem, text: str) -> bool:
        """Whether a reply (with or without its thinking section) ends in the right answer."""
        return text.rpartition(END_THINK)[2].strip() == problem.answer


def names(rng: random.Random, count: int) -> list[str]:
    """Draw distinct names."""
    return rng.sample(NAMES, count)


def tokens_of(text: str) -> list[str]:
    """Split a text into the reasoner's tokens."""
    return re.findall(TOKEN_PATTERN, text)
