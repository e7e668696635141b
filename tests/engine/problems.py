"""Problems that the bundled model solves, with their answers."""

from __future__ import annotations

import random
import string


def walk(seed: int, nodes: int = 6, steps: int = 40) -> tuple[str, str]:
    """Build a walk on a functional graph; the model writes one step a line and then a dot and the last node."""
    rng = random.Random(seed)
    names = rng.sample(string.ascii_lowercase, nodes)
    edge = {a: rng.choice(names) for a in names}
    order = rng.sample(names, nodes)
    node, chain = names[0], []
    for left in range(steps, 0, -1):
        chain.append(f"{left:02d}{node}>{edge[node]}")
        node = edge[node]
    problem = ";".join(f"{a}>{edge[a]}" for a in order) + f";?{names[0]}{steps}"
    return problem, ",".join(chain) + f",.{node}"


def definitions(seed: int, variables: int = 10, asked: int = 4) -> tuple[str, str]:
    """Build shuffled variable definitions (sums modulo 10) and the answers, one an asked variable."""
    rng = random.Random(seed)
    names = rng.sample(string.ascii_lowercase, variables)
    values, lines = {}, []
    for i, name in enumerate(names):
        if i == 0 or rng.random() < 0.25:
            values[name] = rng.randrange(10)
            lines.append(f"{name}={values[name]}")
        else:
            other, add = rng.choice(names[:i]), rng.randrange(10)
            values[name] = (values[other] + add) % 10
            lines.append(f"{name}={other}+{add}")
    rng.shuffle(lines)
    wanted = rng.sample(names, asked)
    return ";".join(lines) + ";?" + "".join(wanted), "".join(str(values[w]) for w in wanted)


def prompt(problem: str) -> str:
    """Raw prompt as the chat template writes it."""
    return f"<bos>{problem}|"


WALKS = [prompt(walk(seed)[0]) for seed in range(8)]
CHAINS = [prompt(definitions(seed)[0]) for seed in range(8)]
PROMPTS = [p for pair in zip(WALKS, CHAINS, strict=True) for p in pair]
