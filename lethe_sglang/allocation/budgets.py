"""From one weight per layer to one integer budget per layer, in a few length classes.

Throughout, ``k_l`` is what layer l keeps besides the recent window, and K bounds the mean of ``k_l`` over the layers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from math import ceil

from lethe_sglang.allocation import rules
from lethe_sglang.allocation.profile import Profile
from lethe_sglang.config import ConfigError, EvictionConfig

MIN_SHARE = Fraction(1, 4)
"""Smallest budget of a layer, in multiples of K: a layer that looks needless must not lose its memory on a guess."""

MAX_SHARE = Fraction(4)
"""Largest budget of a layer, in multiples of K: what one layer holds bounds the cells that every block has."""

CLASSES = 4
"""Most distinct budgets: FlashInfer makes an attention plan for each (``attention.length_classes``)."""


def layer_budgets(mean: int, weights: Sequence[float], floor: int, classes: int = CLASSES) -> tuple[int, ...]:
    """Share ``len(weights) * mean`` tokens among the layers in proportion to their weights.

    The shares are ``clamp(c * w_l, max(floor, MIN_SHARE * K), MAX_SHARE * K)`` with the one ``c`` that makes their sum
    L * K. The sorted shares are cut into ``classes`` runs by least squares, and each run gets its mean rounded down.
    So layers of equal weight get equal budgets, a larger weight never gets a smaller budget, and the sum is at most
    L * K and misses it by less than one token a layer.

    Parameters
    ----------
    mean
        K, tokens per layer, recent window not included; at least ``floor``.
    weights
        One positive finite weight per layer, first layer first; only their ratios matter.
    floor
        Smallest legal budget of a layer, in tokens, >= 1.
    classes
        Most distinct budgets, >= 1.

    Returns
    -------
    tuple[int, ...]
        k_l in tokens, first layer first.

    Examples
    --------
    >>> layer_budgets(100, (1.0, 1.0, 2.0, 4.0), floor=5, classes=2)
    (66, 66, 66, 200)
    """
    low, high = Fraction(max(floor, ceil(MIN_SHARE * mean))), MAX_SHARE * mean
    exact = [Fraction(weight) for weight in weights]
    factor = _multiplier(exact, len(weights) * mean, low, high)
    shares = [min(max(factor * weight, low), high) for weight in exact]
    ordered = sorted(shares)
    budget_of: dict[Fraction, int] = {}
    for start, end in pairwise(_cut(ordered, classes)):
        budget_of |= dict.fromkeys(ordered[start:end], sum(ordered[start:end]) // (end - start))
    return tuple(budget_of[share] for share in shares)


def from_config(config: EvictionConfig, num_layers: int, profile: Profile | None = None) -> tuple[int, ...]:
    """Return k_l of every layer as ``config`` asks for it; with allocation breakpoint, k_l of the first round.

    Parameters
    ----------
    config
        The server's configuration.
    num_layers
        L, the layers of the model.
    profile
        The model's profile; required if ``budget.reads_profile``.

    Returns
    -------
    tuple[int, ...]
        Tokens kept per layer besides the recent window (``config.recent``), first layer first. The sum is at most
        L * ``config.scored``, but with allocation list it is what the list says: up to L - 1 tokens more, since
        ``budget.tokens`` is the mean of the list rounded down.

    Raises
    ------
    ConfigError
        If ``budget.layers`` or the profile has not as many layers as the model, or there is no profile where one is
        needed.
    """
    budget = config.budget
    if budget.layers is not None:
        if len(budget.layers) != num_layers:
            raise ConfigError(
                f"budget.layers: got {len(budget.layers)} values, but the model has {num_layers} layers; give one each"
            )
        return tuple(tokens - config.recent for tokens in budget.layers)
    if not budget.reads_profile:
        return (config.scored,) * num_layers
    if profile is None:
        raise ConfigError(f"budget.allocation {budget.allocation}: needs a profile; set budget.profile to a file")
    if profile.model.layers != num_layers:
        raise ConfigError(
            f"budget.profile: has {profile.model.layers} layers, but the model has {num_layers}; "
            "make one with lethe profile"
        )
    return layer_budgets(config.scored, rules.weights(profile), config.floor)


def scale(base: Sequence[int], mean: int, floor: int) -> tuple[int, ...]:
    """Derive one request's k_l from the server's, for a request that asked for another budget.

    The budgets are ``max(floor, c * base_l)`` rounded down, with the largest ``c`` for which the sum stays within
    L * ``mean``. A layer's result depends on its base alone: equal bases stay equal and their order stays, so a
    server's map from layers to length classes serves every request.

    Parameters
    ----------
    base
        The server's k_l in tokens, first layer first, each >= 1.
    mean
        The request's K, in tokens, >= ``floor``.
    floor
        Smallest legal budget of a layer, in tokens, >= 1.

    Examples
    --------
    >>> scale((66, 66, 66, 202), mean=50, floor=5)
    (33, 33, 33, 101)
    """
    total = len(base) * mean
    factor = _multiplier([Fraction(tokens) for tokens in base], total, Fraction(floor), Fraction(total))
    return tuple(max(floor, int(factor * tokens)) for tokens in base)


def _multiplier(weights: Sequence[Fraction], total: int, low: Fraction, high: Fraction) -> Fraction:
    """Find ``c`` such that the sum of ``clamp(c * w, low, high)`` is ``total``.

    The sum grows with c, linearly between the points where a layer leaves ``low`` or reaches ``high``: find the last
    such point whose sum does not exceed ``total``, then go on along the layers that are free there.
    """

    def reached(factor: Fraction) -> Fraction:
        return sum((min(max(factor * weight, low), high) for weight in weights), Fraction())

    points = sorted({bound / weight for weight in weights for bound in (low, high)})
    start = points[max(bisect_left(points, True, key=lambda point: reached(point) > total) - 1, 0)]
    slope = sum(weight for weight in weights if low <= start * weight < high)
    return start + (total - reached(start)) / slope if slope else start


def _cut(ordered: Sequence[Fraction], classes: int) -> tuple[int, ...]:
    """Cut ascending shares into runs with the least sum of squared distances to the runs' means.

    Dynamic programming over the places where a run may end; equal shares stay in one run.

    Returns
    -------
    tuple[int, ...]
        0 and the end of each run: at most ``classes`` runs, fewer if there are fewer distinct shares.
    """
    sums = [0.0, *accumulate(float(share) for share in ordered)]
    squares = [0.0, *accumulate(float(share) ** 2 for share in ordered)]
    ends = [i for i in range(1, len(ordered) + 1) if ordered[i - 1 : i] != ordered[i : i + 1]]

    def cost(start: int, end: int) -> float:
        return squares[end] - squares[start] - (sums[end] - sums[start]) ** 2 / (end - start)

    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for _ in range(min(classes, len(ends))):
        best = {
            end: min((spent + cost(start, end), (*cut, end)) for start, (spent, cut) in best.items() if start < end)
            for end in ends
            if end > min(best)
        }
    return best[len(ordered)][1]
