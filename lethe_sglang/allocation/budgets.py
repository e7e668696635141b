"""From one weight per layer to one integer budget per layer, in a few length classes, with the mean kept.

Throughout, ``k_l`` is what layer l keeps besides the recent window, and K is the mean of ``k_l`` over the layers.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from lethe_sglang.allocation.profile import Profile
from lethe_sglang.allocation.rules import pyramid
from lethe_sglang.allocation.rules import weights as rule_weights
from lethe_sglang.config import ConfigError, EvictionConfig

_FIRST_WINDOW = 4
"""Tokens either side of the relaxed optimum in which the values of the length classes are looked for at first."""

_BISECTIONS = 8
"""Steps towards the quantile at which the length classes have the right sum."""


class _Class(NamedTuple):
    """Layers that get the same budget: their unrounded shares in ascending order."""

    shares: tuple[float, ...]

    def distance(self, value: int) -> float:
        """Return the sum of absolute distances between the shares and ``value``, in tokens."""
        return math.fsum(abs(share - value) for share in self.shares)

    def at(self, quantile: float) -> float:
        """Return the share at ``quantile``, in [0, 1)."""
        return self.shares[math.floor(quantile * len(self.shares))]


def layer_budgets(
    num_layers: int,
    mean: int,
    weights: Sequence[float] | None,
    floor: int,
    min_factor: float,
    max_factor: float,
    classes: int,
) -> tuple[int, ...]:
    """Share ``num_layers * mean`` tokens among the layers in proportion to their weights.

    The shares are ``clamp(c * w_l, max(floor, min_factor * K), max_factor * K)`` with the one ``c`` that makes their
    sum L * K: clamping and redistributing what it freed or took. They are rounded to integers by largest remainder. If
    that gives more than ``classes`` distinct budgets, the layers are cut by dynamic programming into that many classes
    of neighbouring shares, with a small total absolute distance to the shares, and each class gets one value.

    The sum is exactly L * K, always: equal budgets for all layers are one way to reach it with any number of classes,
    so the bound on memory never has to be met from below. A layer with a larger weight never gets a smaller budget.
    Layers of equal weight get equal budgets, or, where the rounding already gives few enough distinct ones, budgets
    that differ by at most one.

    Parameters
    ----------
    num_layers
        L, the layers of the model.
    mean
        K, tokens per layer, recent window not included.
    weights
        One positive finite weight per layer, first layer first; None gives every layer ``mean``.
    floor
        Smallest legal budget of a layer, in tokens; at most ``mean``.
    min_factor, max_factor
        Smallest and largest budget of a layer in multiples of ``mean``, ``0 < min_factor <= 1 <= max_factor``.
    classes
        Largest number of distinct budgets, >= 1.

    Returns
    -------
    tuple[int, ...]
        k_l in tokens, first layer first.

    Raises
    ------
    ConfigError
        If an argument is out of its range, or there is not one weight per layer.

    Examples
    --------
    >>> layer_budgets(4, 100, (1.0, 1.0, 2.0, 4.0), floor=5, min_factor=0.25, max_factor=4.0, classes=2)
    (66, 66, 66, 202)
    """
    _require(num_layers >= 1, f"number of layers: got {num_layers}, expected >= 1")
    _require(mean >= max(floor, 1), f"mean budget: got {mean} tokens, expected >= {max(floor, 1)}")
    _require(0 < min_factor <= 1, f"budget.min_factor: got {min_factor}, expected > 0 and <= 1")
    _require(1 <= max_factor < math.inf, f"budget.max_factor: got {max_factor}, expected >= 1 and finite")
    _require(classes >= 1, f"budget.classes: got {classes}, expected >= 1")
    if weights is None:
        return (mean,) * num_layers
    _require(
        len(weights) == num_layers,
        f"budget.weights: got {len(weights)} weights, but the model has {num_layers} layers; give one each",
    )
    for layer, weight in enumerate(weights):
        _require(
            0 < weight < math.inf,
            f"budget.weights[{layer}]: got {weight}, expected a positive and finite number",
        )

    total = num_layers * mean
    low = max(floor, math.ceil(_decimal(min_factor) * mean))
    high = math.floor(_decimal(max_factor) * mean)
    exact = [Fraction(float(weight)) for weight in weights]
    factor = _multiplier(exact, total, low, high)
    shares = [min(max(factor * weight, Fraction(low)), Fraction(high)) for weight in exact]
    budgets = _largest_remainder(shares, total)
    if len(set(budgets)) <= classes:
        return budgets
    return _quantise([float(share) for share in shares], classes, total, low, high)


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
        Tokens kept per layer besides the recent window (``config.recent``), first layer first. The sum is
        L * ``config.scored``, but with allocation list it is what the list says: up to L - 1 tokens more, since
        ``budget.tokens`` is the mean of the list rounded down.

    Raises
    ------
    ConfigError
        If ``budget.weights``, ``budget.layers`` or the profile has not as many layers as the model, or there is no
        profile where one is needed.
    """
    budget, weights = config.budget, config.budget.weights
    if budget.allocation == "list" and budget.layers is not None:
        _require(
            len(budget.layers) == num_layers,
            f"budget.layers: got {len(budget.layers)} values, but the model has {num_layers} layers; give one each",
        )
        return tuple(tokens - config.recent for tokens in budget.layers)
    if budget.allocation == "pyramid":
        weights = tuple(pyramid(num_layers))
    if budget.reads_profile:
        if profile is None:
            raise ConfigError(f"budget.allocation {budget.allocation}: needs a profile; set budget.profile to a file")
        _require(
            profile.model.layers == num_layers,
            f"budget.profile: has {profile.model.layers} layers, but the model has {num_layers}; "
            "make one with lethe profile",
        )
        weights = rule_weights(budget.allocation, profile, budget.alpha)
    return layer_budgets(
        num_layers,
        config.scored,
        weights,
        floor=config.floor,
        min_factor=budget.min_factor,
        max_factor=budget.max_factor,
        classes=budget.classes,
    )


def scale(base: Sequence[int], base_mean: int, mean: int, floor: int) -> tuple[int, ...]:
    """Derive one request's k_l from the server's, for a request that asked for another budget.

    The budgets are ``max(floor, c * base_l)`` rounded down, with ``c = mean / base_mean``, or the largest smaller ``c``
    for which the sum stays within L * ``mean``. A layer's result depends on its base alone: equal bases stay equal and
    their order stays, so a server's map from layers to length classes serves every request.

    Parameters
    ----------
    base
        The server's k_l in tokens, first layer first, each >= 1.
    base_mean
        The server's K that ``base`` was made for, in tokens, >= 1.
    mean
        The request's K, in tokens, >= ``floor``.
    floor
        Smallest legal budget of a layer, in tokens.

    Returns
    -------
    tuple[int, ...]
        The request's k_l in tokens; their sum is at most L * ``mean``. With ``mean == base_mean`` it is ``base`` itself
        where that is within the bound and nowhere below ``floor``.

    Raises
    ------
    ConfigError
        If an argument is out of its range.

    Examples
    --------
    >>> scale((66, 66, 66, 202), base_mean=100, mean=50, floor=5)
    (33, 33, 33, 101)
    """
    _require(len(base) >= 1 and min(base) >= 1, f"base budgets: got {tuple(base)}, expected one or more, each >= 1")
    _require(base_mean >= 1, f"base mean budget: got {base_mean} tokens, expected >= 1")
    _require(mean >= max(floor, 1), f"mean budget: got {mean} tokens, expected >= {max(floor, 1)}")
    largest = _multiplier([Fraction(tokens) for tokens in base], len(base) * mean, floor, None)
    factor = min(Fraction(mean, base_mean), largest)
    return tuple(max(floor, math.floor(factor * tokens)) for tokens in base)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ConfigError(problem)


def _decimal(value: float) -> Fraction:
    """Return the decimal that was written for ``value``: 0.07 is 7/100."""
    return Fraction(repr(float(value)))


def _multiplier(weights: Sequence[Fraction], total: int, low: int, high: int | None) -> Fraction:
    """Find ``c`` such that the sum of ``clamp(c * w, low, high)`` is ``total``; ``high`` None is no upper bound.

    The sum grows with c, linearly between the points where a layer leaves ``low`` or reaches ``high``: find the last
    such point whose sum does not exceed ``total``, then go on along the layers that are free there.
    """

    def clamped(factor: Fraction, weight: Fraction) -> Fraction:
        value = max(factor * weight, Fraction(low))
        return value if high is None else min(value, Fraction(high))

    bounds = (low,) if high is None else (low, high)
    points = sorted({Fraction(bound) / weight for weight in weights for bound in bounds})
    above = bisect_left(points, True, key=lambda point: sum(clamped(point, weight) for weight in weights) > total)
    start = points[max(above - 1, 0)]
    missing = total - sum(clamped(start, weight) for weight in weights)
    slope = sum(weight for weight in weights if low <= start * weight and (high is None or start * weight < high))
    return start + missing / slope if missing and slope else start


def _largest_remainder(shares: Sequence[Fraction], total: int) -> tuple[int, ...]:
    """Round ``shares``, whose sum is ``total``, to integers of that sum; of equal fractions the lower layer goes up."""
    budgets = [math.floor(share) for share in shares]
    by_fraction = sorted(range(len(shares)), key=lambda layer: budgets[layer] - shares[layer])
    for layer in by_fraction[: total - sum(budgets)]:
        budgets[layer] += 1
    return tuple(budgets)


def _quantise(shares: Sequence[float], classes: int, total: int, low: int, high: int) -> tuple[int, ...]:
    """Give every layer one of at most ``classes`` integers in ``[low, high]``, in sum ``total``, near its share.

    A cut whose classes sit at their medians is nearest to the shares but misses the sum. Classes that sit at their
    q-quantile instead are the optimum of ``distance + (1 - 2 q) * (sum - total)``, a Lagrangian of the problem;
    bisecting q brings their sum to ``total``. Every cut met on the way is a candidate, and the one that is nearest to
    the shares with integers of the right sum is taken.
    """
    candidates: dict[tuple[_Class, ...], None] = {}
    lower, upper = 0.0, 1.0
    for _ in range(_BISECTIONS):
        quantile = (lower + upper) / 2
        cut = _cut_into_classes(shares, classes, quantile)
        candidates[cut] = None
        reached = sum(len(group.shares) * group.at(quantile) for group in cut)
        lower, upper = (quantile, upper) if reached < total else (lower, quantile)
    solutions = [(cut, _class_values(cut, total, low, high)) for cut in candidates]
    cut, values = min(
        solutions, key=lambda found: math.fsum(group.distance(value) for group, value in zip(*found, strict=True))
    )
    value_of = {share: value for group, value in zip(cut, values, strict=True) for share in group.shares}
    return tuple(value_of[share] for share in shares)


def _cut_into_classes(shares: Sequence[float], classes: int, quantile: float) -> tuple[_Class, ...]:
    """Cut the sorted shares into at most ``classes`` runs with the least total cost; equal shares stay together.

    The cost of a run is the least sum of ``2 q (share - v)`` over the shares above v and ``2 (1 - q) (v - share)``
    over those below; v is then the q-quantile of the run, and with q = 1/2 the cost is the distance to the median.
    ``best[j]`` is the least cost of the first j distinct shares in the classes used so far, ``starts[j]`` where the
    last class of that solution begins.
    """
    counts = sorted(Counter(shares).items())
    ordered = [share for share, count in counts for _ in range(count)]
    ends = [0, *itertools.accumulate(count for _, count in counts)]
    sums = [0.0, *itertools.accumulate(ordered)]
    size = len(counts)

    def run_cost(first: int, last: int) -> float:
        begin, end = ends[first], ends[last]
        middle = begin + math.floor(quantile * (end - begin))
        value = ordered[middle]
        above = sums[end] - sums[middle] - (end - middle) * value
        below = (middle - begin) * value - (sums[middle] - sums[begin])
        return 2 * quantile * above + 2 * (1 - quantile) * below

    cost = [[run_cost(first, last) for first in range(last)] for last in range(size + 1)]
    best = [0.0] + [math.inf] * size
    history: list[list[int]] = []
    for _ in range(min(classes, size)):
        starts = [0] * (size + 1)
        extended = [math.inf] * (size + 1)
        for last in range(1, size + 1):
            extended[last], starts[last] = min((best[first] + cost[last][first], first) for first in range(last))
        best = extended
        history.append(starts)

    cut: list[_Class] = []
    last = size
    for starts in reversed(history):
        first = starts[last]
        cut.append(_Class(tuple(ordered[ends[first] : ends[last]])))
        last = first
    return tuple(reversed(cut))


def _class_values(cut: Sequence[_Class], total: int, low: int, high: int) -> tuple[int, ...]:
    """Give each class one integer in ``[low, high]``, ascending, so that all layers together get ``total`` tokens.

    Every combination near the relaxed optimum is searched, and ever farther ones until one has the right sum.
    """
    centres = _relaxed_values(cut, total, low, high)
    window = _FIRST_WINDOW
    while True:
        ranges = [range(max(low, centre - window), min(high, centre + window) + 1) for centre in centres]
        values = _search(cut, ranges, total)
        if values is not None:
            return values
        window *= 2


def _relaxed_values(cut: Sequence[_Class], total: int, low: int, high: int) -> list[int]:
    """Start at every class's median and move the cheapest class until the sum misses ``total`` by less than a step."""
    values = [min(max(round(group.shares[len(group.shares) // 2]), low), high) for group in cut]
    missing = total - sum(len(group.shares) * value for group, value in zip(cut, values, strict=True))
    sign = 1 if missing > 0 else -1
    missing = abs(missing)
    while True:
        movable = [
            index
            for index, group in enumerate(cut)
            if len(group.shares) <= missing and low <= values[index] + sign <= high
        ]
        if not movable:
            return values

        def price(index: int) -> float:
            group, value = cut[index], values[index]
            return (group.distance(value + sign) - group.distance(value)) / len(group.shares)

        index = min(movable, key=price)
        group, value = cut[index], values[index]
        # The price of a class stays the same until its value passes one of its shares.
        ahead = [sign * (share - value) for share in group.shares if sign * (share - value) >= 1]
        limit = high - value if sign > 0 else value - low
        step = min(missing // len(group.shares), math.floor(min(ahead, default=limit)), limit)
        values[index] = value + sign * step
        missing -= step * len(group.shares)


def _search(cut: Sequence[_Class], ranges: Sequence[range], total: int) -> tuple[int, ...] | None:
    """Find ascending values, one of each range, of sum ``total`` over all layers and least distance to the shares.

    A state is the tokens still to be given after the classes so far; per last value it holds the cheapest way there.
    """
    sizes = [len(group.shares) for group in cut]
    states: dict[int, dict[int, tuple[float, tuple[int, ...]]]] = {0: {total: (0.0, ())}}
    for index, (group, candidates) in enumerate(zip(cut, ranges, strict=True)):
        least = sum(size * later[0] for size, later in zip(sizes[index + 1 :], ranges[index + 1 :], strict=True))
        most = sum(size * later[-1] for size, later in zip(sizes[index + 1 :], ranges[index + 1 :], strict=True))
        earlier = sorted(states.items(), reverse=True)
        reachable: dict[int, tuple[float, tuple[int, ...]]] = {}
        states = {}
        for value in candidates:
            while earlier and earlier[-1][0] <= value:
                for rest, way in earlier.pop()[1].items():
                    reachable[rest] = min(way, reachable.get(rest, way))
            price = group.distance(value)
            states[value] = {
                rest - sizes[index] * value: (way[0] + price, (*way[1], value))
                for rest, way in reachable.items()
                if least <= rest - sizes[index] * value <= most
            }
    ways = [way for ends in states.values() for rest, way in ends.items() if rest == 0]
    return min(ways)[1] if ways else None
