"""Walking a graph in which every node has one successor."""

from __future__ import annotations

import itertools
import random
from typing import ClassVar

from lethe_bench.tasks.base import Family, Problem, names


def walk(rng: random.Random, steps: int) -> tuple[str, str, str]:
    """Return a question (shuffled edges, start, steps), its chain of thought and the last node."""
    nodes = names(rng, rng.randint(4, 16))
    edge = dict(itertools.pairwise(nodes))
    edge[nodes[-1]] = rng.choice(nodes[: len(nodes) // 2])  # a tail, then a cycle of at least half the nodes
    node, chain = nodes[0], []
    for left in range(steps, 0, -1):
        chain.append(f"{_count(left)}{node}{edge[node].upper()}")
        node = edge[node]
    given = ";".join(f"{a}{edge[a].upper()}" for a in rng.sample(nodes, len(nodes)))
    return f"{given};?{nodes[0].upper()}{_count(steps)}", ",".join(chain), node.upper()


def _count(steps: int) -> str:
    return f"{steps // 100}#{steps % 100:02d}"


class Walk(Family):
    """``aC;cB;bA;?A0#03`` asks where three steps from a lead: ``0#03aC,0#02cB,0#01bA``, answered by ``A``."""

    name: ClassVar[str] = "walk"

    def generate(self, rng: random.Random, tokens: int) -> Problem:
        """See the base class; a step is five tokens."""
        return Problem(self.name, *walk(rng, max(tokens // 5, 1)))
