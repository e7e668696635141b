"""What each layer costs when it alone is pruned, in forced replies: what a profile's rule ``fidelity`` shares by.

python -m lethe_bench.fidelity.layers PROFILE   says which layers bear the cost, and which statistics tell
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lethe_bench.cli.profiles import rank_correlation
from lethe_bench.fidelity.report import KL, MEASURES, RECALL, read
from lethe_bench.fidelity.run import Experiment
from lethe_bench.one_layer import pruned
from lethe_sglang.allocation.profile import Fidelity, Profile, load
from lethe_sglang.config import ConfigError, from_mapping
from lethe_sglang.config.policy_section import laid_over

LONGEST_PROMPT = 512
"""Tokens of a prompt that a layer which is not pruned has room for, besides the reply."""


def arms(experiment: Experiment, layers: int) -> Experiment:
    """Return the experiment whose arms prune one layer each, by the options of its first arm.

    A pruned layer keeps ``budget.tokens``, recent window included; the others keep everything.

    Raises
    ------
    ConfigError
        If those options share the budget by themselves.
    """
    first = laid_over(experiment.base, next(iter(experiment.arms.values())))
    config = from_mapping(first)
    if config.budget.allocation != "uniform":
        raise ConfigError(
            f"budget.allocation: got {config.budget.allocation}, but the layers are pruned one at a time; leave it out"
        )
    longest = experiment.tokens + LONGEST_PROMPT
    mean = (config.budget.tokens + (layers - 1) * longest) // layers
    retain = {**first.get("retain", {}), "recent_ratio": (config.recent - 0.5) / mean}
    others = {name: part for name, part in first.items() if name not in ("budget", "retain")}
    found: dict[str, dict[str, Any]] = {
        name(layer): {**others, "retain": retain, **pruned(layer, config.budget.tokens, layers, longest)}
        for layer in range(layers)
    }
    return experiment.model_copy(update={"base": {}, "arms": found})


def name(layer: int) -> str:
    """Return the name of the arm that prunes a layer."""
    return f"layer-{layer}"


def measured(out: Path, layers: int, kept: int) -> Fidelity:
    """Read what the layers cost from a results directory; steps before the first round are not counted."""
    results = read(out)
    names = {corpus: results.names(corpus, *map(name, range(layers))) for corpus in results.experiment["corpora"]}
    documents = [document for some in names.values() for document in some]

    def mean(layer: int, measure: Any, some: Sequence[str]) -> float:
        numbers = results.numbers(measure, name(layer), list(some), kept)
        return float(np.mean(numbers)) if numbers else 0.0

    recall = names.get("recall", [])
    return Fidelity(
        kept=kept,
        tokens=results.experiment["tokens"],
        documents=len(documents),
        kl=tuple(mean(layer, MEASURES[KL], documents) for layer in range(layers)),
        recall=tuple(mean(layer, RECALL[0], recall) for layer in range(layers)),
    )


def correlations(profile: Profile) -> str:
    """Return Markdown: the rank correlation of every statistic of a profile with either cost of a layer."""
    assert profile.fidelity is not None
    lines = ["| statistic | KL | NLL of values |", "| --- | --- | --- |"]
    for statistic, values in profile.statistics.items():
        found = (rank_correlation(values.mean, cost) for cost in (profile.fidelity.kl, profile.fidelity.recall))
        lines.append(f"| `{statistic}` | {' | '.join(f'{value:+.2f}' for value in found)} |")
    return "\n".join(lines)


def dearest(costs: Sequence[float], count: int) -> str:
    """Say which ``count`` layers cost most, and which part of all layers' cost is theirs."""
    first = sorted(range(len(costs)), key=costs.__getitem__, reverse=True)[:count]
    part = sum(costs[layer] for layer in first) / sum(max(cost, 0.0) for cost in costs)
    return f"{', '.join(map(str, first))}: {part:.0%}"


def main(path: Path) -> None:
    """Print both of a profile."""
    profile = load(path)
    assert profile.fidelity is not None
    print(f"KL: layers {dearest(profile.fidelity.kl, 8)}; NLL of values: layers {dearest(profile.fidelity.recall, 4)}")
    print(correlations(profile))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
