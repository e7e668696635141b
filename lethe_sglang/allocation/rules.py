"""From a profile to one weight per layer: this project's rules and its neighbours'.

Every rule returns one non-negative number per layer; ``budgets.layer_budgets`` shares the tokens in proportion to its
power alpha, within floor and ceiling, in length classes. So the rules differ in nothing but these numbers. With alpha 1
they are what the papers say, 0 is uniform, larger is more uneven, and a negative alpha turns the order round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lethe_sglang.allocation.profile import Profile, Rule

SMALLEST = 1e-6
"""Weights below this part of the largest are raised to it: a layer of sparsity 1 still gets its floor."""

PYRAMID_BETA = 20
"""PyramidKV's beta: the top layer's share is 1 / beta of the mean."""


def concentration(profile: Profile) -> Sequence[float]:
    """``V_l``, the variance over tokens of the attention they received in all: D2O's measure, turned round.

    What predicted best which layers of the bundled model can do with less, of all the pass measures
    (docs/results/allocation.md).
    """
    return profile.mean("concentration")


def fidelity(profile: Profile) -> Sequence[float]:
    """Return each layer's part of what pruning a layer alone costs, in the distribution and in values: ours."""
    assert profile.fidelity is not None  # the artifact is checked for it
    measured = ([max(cost, 0.0) for cost in costs] for costs in (profile.fidelity.kl, profile.fidelity.recall))
    parts = [[cost / sum(costs) for cost in costs] for costs in measured if sum(costs) > 0]
    return [sum(layer) for layer in zip(*parts, strict=True)] or [1.0] * profile.model.layers


def recurrence(profile: Profile) -> Sequence[float]:
    """Return the share of tokens that became important again: ours."""
    return profile.mean("recurrence")


def sensitivity(profile: Profile) -> Sequence[float]:
    """``S_l + mean of S``, S what pruning that layer alone changes: half the budget is shared evenly."""
    assert profile.sensitivity is not None  # the artifact is checked for it
    changed = profile.sensitivity.changed
    return [share + sum(changed) / len(changed) for share in changed]


def hoyer(profile: Profile) -> Sequence[float]:
    """``1 - H_l``, H the Hoyer sparsity (paper eq. 1; the mapping is ours): sparse layers get less."""
    return [1 - h for h in profile.mean("hoyer")]


def pyramid(profile: Profile) -> Sequence[float]:
    """PyramidKV (2406.02069): linear from ``2 - 1 / beta`` at the first layer to ``1 / beta`` at the last.

    It looks at nothing that was measured; ``budgets.MIN_SHARE`` is above its smallest share and cuts it.
    """
    last, least = profile.model.layers - 1, 1 / PYRAMID_BETA
    return [2 - least - 2 * (1 - least) / last * layer for layer in range(last + 1)] if last else [1.0]


def d2o(profile: Profile) -> Sequence[float]:
    """D2O (2406.13035): ``softmax_l(-V_l)``, V the variance over tokens of the attention they received in all.

    D2O measures the prompt and scales V to [0, 1] over the heads of a layer; here decode queries are measured, with
    heads averaged, and V is scaled to [0, 1] over the layers. Layers 0, 1 and last are not exempt.
    """
    values = profile.mean("concentration")
    low, spread = min(values), max(values) - min(values)
    return [math.exp(-(v - low) / spread if spread > 0 else 0.0) for v in values]


def cake(profile: Profile) -> Sequence[float]:
    """CAKE (2503.12491): ``H_l ** (1 / tau1) * V_l ** (1 / tau2)`` with tau1 = tau2 = 1 / alpha.

    H is the entropy of attention over tokens, V its variance over queries, summed over tokens. CAKE looks at the last
    queries of the prompt; here it is every decode query.
    """
    return [h * v for h, v in zip(profile.mean("entropy"), profile.mean("fluctuation"), strict=True)]


def zipvl(profile: Profile) -> Sequence[float]:
    """ZipVL (2410.08584): the tokens that hold 95 % of the attention."""
    return profile.mean("coverage_95")


RULES: dict[Rule, Callable[[Profile], Sequence[float]]] = {
    "concentration": concentration,
    "sensitivity": sensitivity,
    "hoyer": hoyer,
    "pyramid": pyramid,
    "d2o": d2o,
    "cake": cake,
    "zipvl": zipvl,
    "fidelity": fidelity,
    "recurrence": recurrence,
}


def weights(profile: Profile) -> tuple[float, ...]:
    """Return the weight of every layer under the profile's rule and alpha: the largest 1, none below ``SMALLEST``.

    Examples
    --------
    >>> weights(profile)  # doctest: +SKIP
    (1.0, 0.71, 0.9, 0.81)
    """
    values = RULES[profile.rule](profile)
    largest = max(values)
    if largest <= 0:
        return (1.0,) * len(values)
    powers = [max(value / largest, SMALLEST) ** profile.alpha for value in values]
    return tuple(max(power / max(powers), SMALLEST) for power in powers)
