"""Walking a graph in which every node has one successor."""

from __future__ import annotations

import itertools
import random
from typing import ClassVar

from lethe_sglang.evaluation.tasks.base import Family, Problem, names


def walk(rng: random.Random, steps: int) -> tuple[str, str, str, str]:
    """Return edges (shuffled), start, chain of thought and the last node of a walk."""
    nodes = names(rng, rng.randint(4, 16))
    edge = dict(itertools.pairwise(nodes))
    edge[nodes[-1]] = rng.choice(nodes[: len(nodes) // 2])  # a tail, then a cycle of at least half the nodes
    node, chain = nodes[0], []
    for left in range(steps, 0, -1):
        chain.append(f"{left:03d}{node}>{edge[node]}")
        node = edge[node]
    return ";".join(f"{a}>{edge[a]}" for a in rng.sample(nodes, len(nodes))), nodes[0], ",".join(chain), node


class Walk(Family):
    """``a>c;b>a;c>b;?a003`` asks where three steps from a lead; the chain is ``003a>c,002c>b,001b>a``."""

    name: ClassVar[str] = "walk"

    def generate(self, rng: random.Random, tokens: int) -> Problem:
        """See the base class; a step is seven tokens."""
        steps = max(tokens // 7, 1)
        edges, start, chain, last = walk(rng, steps)
        return Problem(self.name, f"{edges};?{start}{steps:03d}", chain, last)
