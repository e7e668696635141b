"""From a profile to one weight per layer: this project's rules and its neighbours'.

Every rule returns one positive number per layer; ``budgets.layer_budgets`` shares the tokens in proportion to them,
within floor and ceiling, in length classes, with the exact mean. So the rules differ in nothing but the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lethe_sglang.allocation.profile import Profile
from lethe_sglang.config import ConfigError

SMALLEST = 1e-6
"""Weights below this part of the largest are raised to it: a layer of sparsity 1 still gets its floor."""

PYRAMID_BETA = 20
"""PyramidKV's beta: the top layer's share is 1 / beta of the mean."""

NO_SENSITIVITY = (
    "budget.allocation sensitivity: the profile has none; make one with lethe profile --sensitivity --out FILE "
    "and set budget.profile to FILE, or set budget.allocation to concentration"
)

Rule = Callable[[Profile, float], Sequence[float]]


def concentration(profile: Profile, alpha: float) -> list[float]:
    """``w_l = V_l ** alpha``, V the variance over tokens of the attention they received in all: D2O's, turned round.

    What predicted best which layers of the bundled model can do with less, of all the pass measures
    (docs/results/allocation.md). ``alpha`` as in :func:`profiled`.
    """
    return [max(v, SMALLEST) ** alpha for v in profile.mean("concentration")]


def sensitivity(profile: Profile, alpha: float) -> list[float]:
    """``w_l = (S_l + mean of S) ** alpha``, S what pruning that layer alone changes: half the budget is shared evenly.

    ``alpha`` as in :func:`profiled`.

    Raises
    ------
    ConfigError
        If the profile has no sensitivity.
    """
    if profile.sensitivity is None:
        raise ConfigError(NO_SENSITIVITY)
    values = profile.sensitivity.changed
    mean = sum(values) / len(values)
    return [(value + mean) ** alpha if mean else 1.0 for value in values]


def profiled(profile: Profile, alpha: float) -> list[float]:
    """``w_l = (1 - H_l) ** alpha``, H the Hoyer sparsity (paper eq. 1; the mapping is ours): sparse layers get less.

    ``alpha`` 0 is uniform, larger is more uneven, negative turns the order round.
    """
    return [max(1 - h, SMALLEST) ** alpha for h in profile.mean("hoyer")]


def d2o(profile: Profile, alpha: float) -> list[float]:
    """D2O (2406.13035): ``w = softmax_l(-V_l)``, V the variance over tokens of the attention they received in all.

    D2O measures the prompt and scales V to [0, 1] over the heads of a layer; here decode queries are measured, with
    heads averaged, and V is scaled to [0, 1] over the layers. Layers 0, 1 and last are not exempt. ``alpha`` is unused.
    """
    values = profile.mean("concentration")
    low, spread = min(values), max(values) - min(values)
    return [math.exp(-(v - low) / spread if spread > 0 else 0.0) for v in values]


def cake(profile: Profile, alpha: float) -> list[float]:
    """CAKE (2503.12491): ``w_l = H_l ** (1 / tau1) * V_l ** (1 / tau2)`` with tau1 = tau2 = 1.

    H is the entropy of attention over tokens, V its variance over queries, summed over tokens. CAKE looks at the last
    queries of the prompt; here it is every decode query. ``alpha`` is unused.
    """
    return [h * v for h, v in zip(profile.mean("entropy"), profile.mean("fluctuation"), strict=True)]


def zipvl(profile: Profile, alpha: float) -> Sequence[float]:
    """ZipVL (2410.08584): the tokens that hold 95 % of the attention. ``alpha`` is unused."""
    return profile.mean("coverage_95")


RULES: dict[str, Rule] = {
    "concentration": concentration,
    "sensitivity": sensitivity,
    "profiled": profiled,
    "d2o": d2o,
    "cake": cake,
    "zipvl": zipvl,
}
"""Allocations that need a profile."""


def pyramid(num_layers: int) -> list[float]:
    """PyramidKV (2406.02069): linear from ``2 - 1 / beta`` at the first layer to ``1 / beta`` at the last.

    It looks at nothing; ``budget.min_factor`` (0.25 by default) is above its smallest share and cuts it.
    """
    least = 1 / PYRAMID_BETA
    step = 2 * (1 - least) / max(num_layers - 1, 1)
    return [2 - least - step * layer for layer in range(num_layers)] if num_layers > 1 else [1.0]


def weights(allocation: str, profile: Profile, alpha: float) -> tuple[float, ...]:
    """Return the positive weight of every layer under a rule of ``RULES``.

    Parameters
    ----------
    allocation
        A key of ``RULES``.
    profile
        What was measured.
    alpha
        Exponent of ``concentration``, ``sensitivity`` and ``profiled``.

    Examples
    --------
    >>> weights("profiled", profile, alpha=1.0)  # doctest: +SKIP
    (0.31, 0.22, 0.28, 0.25)
    """
    found = RULES[allocation](profile, alpha)
    largest = max(found)
    return tuple(max(w / largest, SMALLEST) for w in found) if largest > 0 else (1.0,) * len(found)
