import math
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lethe_sglang.allocation import from_config, layer_budgets, scale
from lethe_sglang.config import ConfigError, from_mapping

RULES = {"floor": 5, "min_factor": 0.25, "max_factor": 4.0, "classes": 4}


def exact_shares(mean: int, weights: list[float], low: float, high: float) -> list[float]:
    """Clamped proportional shares by plain bisection of the common factor."""
    small, large = 0.0, high / min(weights)
    for _ in range(200):
        factor = (small + large) / 2
        if sum(min(max(factor * weight, low), high) for weight in weights) > mean * len(weights):
            large = factor
        else:
            small = factor
    return [min(max(small * weight, low), high) for weight in weights]


@st.composite
def cases(draw):
    weights = draw(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=24))
    floor = draw(st.integers(1, 16))
    mean = draw(st.integers(floor, 2000))
    rules = {
        "floor": floor,
        "min_factor": draw(st.floats(0.01, 1.0)),
        "max_factor": draw(st.floats(1.0, 8.0)),
        "classes": draw(st.integers(1, 16)),
    }
    return mean, weights, rules


class TestLayerBudgets:
    def test_without_weights_every_layer_gets_the_mean(self):
        assert layer_budgets(4, 33, None, **RULES) == (33, 33, 33, 33)

    def test_budgets_are_proportional_to_the_weights(self):
        assert layer_budgets(4, 100, (1, 1, 2, 4), **RULES) == (50, 50, 100, 200)
        assert layer_budgets(4, 100, (4, 1, 2, 1), **RULES) == (200, 50, 100, 50)

    def test_what_a_bound_takes_or_frees_goes_to_the_other_layers_in_proportion(self):
        assert layer_budgets(4, 100, (1, 1, 1, 97), **RULES | {"max_factor": 2.5}) == (50, 50, 50, 250)
        assert layer_budgets(4, 100, (1, 100, 100, 200), **RULES) == (25, 94, 94, 187)

    def test_the_largest_remainders_are_rounded_up(self):
        assert layer_budgets(4, 10, (1, 1, 2, 2), **RULES) == (7, 7, 13, 13)

    def test_classes_are_cut_where_the_shares_are_far_apart(self):
        budgets = layer_budgets(6, 100, (1.0, 1.02, 0.98, 3.0, 3.1, 2.9), **RULES | {"classes": 2})
        assert len(set(budgets[:3])) == 1
        assert len(set(budgets[3:])) == 1
        assert budgets == (50, 50, 50, 150, 150, 150)

    def test_the_classes_of_a_small_model_are_as_near_as_any(self):
        weights = [0.9, 0.2, 0.35, 0.5, 0.21, 0.88]
        shares = exact_shares(20, weights, 5, 80)
        budgets = layer_budgets(6, 20, weights, **RULES | {"classes": 2})

        def distance(budgets):
            return sum(abs(share - budget) for share, budget in zip(shares, budgets, strict=True))

        order = sorted(range(6), key=shares.__getitem__)
        others = [
            [low if order.index(layer) < cut else high for layer in range(6)]
            for cut in range(1, 6)
            for low in range(5, 81)
            for high in range(low, 81)
            if cut * low + (6 - cut) * high == 120
        ]
        assert distance(budgets) == pytest.approx(min(map(distance, others)))

    def test_the_cut_takes_the_exact_sum_into_account(self):
        weights = (0.6, 0.8, 1.0, 0.4, 0.8, 0.7)
        assert layer_budgets(6, 20, weights, **RULES | {"classes": 2}) == (16, 22, 22, 16, 22, 22)

    @pytest.mark.parametrize("classes", range(1, 13))
    def test_no_more_classes_are_made_than_allowed(self, classes):
        weights = [0.1 + 0.05 * layer * layer for layer in range(12)]
        budgets = layer_budgets(12, 700, weights, **RULES | {"classes": classes})
        assert sum(budgets) == 12 * 700
        assert len(set(budgets)) <= classes

    def test_order_is_kept_where_only_a_few_values_are_legal(self):
        weights = (0.63, 0.03, 0.06, 0.4, 0.95, 0.59, 0.16, 0.02, 0.3, 0.09, 0.79)
        budgets = layer_budgets(11, 3, weights, 2, 0.1, 4.0, 3)
        ranked = [budget for _, budget in sorted(zip(weights, budgets, strict=True))]
        assert ranked == sorted(ranked)
        assert sum(budgets) == 33

    @settings(deadline=None)
    @given(cases())
    def test_the_sum_is_exact_the_bounds_hold_and_the_classes_are_few(self, case):
        mean, weights, rules = case
        budgets = layer_budgets(len(weights), mean, weights, **rules)
        assert sum(budgets) == mean * len(weights)
        assert min(budgets) >= max(rules["floor"], rules["min_factor"] * mean)
        assert max(budgets) <= rules["max_factor"] * mean
        assert len(set(budgets)) <= rules["classes"]

    @settings(deadline=None)
    @given(cases())
    def test_a_larger_weight_never_gets_a_smaller_budget(self, case):
        mean, weights, rules = case
        budgets = layer_budgets(len(weights), mean, weights, **rules)
        ranked = sorted(zip(weights, budgets, strict=True))
        for (light, small), (heavy, large) in pairwise(ranked):
            assert small <= large
            assert light < heavy or large - small <= 1

    @settings(deadline=None)
    @given(cases())
    def test_with_enough_classes_every_budget_is_its_share_rounded(self, case):
        mean, weights, rules = case
        low = max(rules["floor"], math.ceil(rules["min_factor"] * mean))
        high = math.floor(rules["max_factor"] * mean)
        assume(low <= mean <= high)
        budgets = layer_budgets(len(weights), mean, weights, **rules | {"classes": 2 * len(weights)})
        for budget, share in zip(budgets, exact_shares(mean, weights, low, high), strict=True):
            assert abs(budget - share) < 1 + 1e-6

    @settings(deadline=None)
    @given(cases(), st.sampled_from([0.5, 2.0, 1024.0]))
    def test_only_the_ratios_of_the_weights_matter(self, case, factor):
        mean, weights, rules = case
        scaled = [weight * factor for weight in weights]
        assert layer_budgets(len(weights), mean, weights, **rules) == layer_budgets(len(weights), mean, scaled, **rules)

    def test_extreme_weights_reach_the_bounds_and_keep_the_mean(self):
        assert layer_budgets(3, 100, (1e-300, 1e300, 1e-300), **RULES) == (25, 250, 25)

    def test_eighty_layers_are_shared_in_good_time(self):
        weights = [0.1 + (layer * 37 % 80) / 80 for layer in range(80)]
        budgets = layer_budgets(80, 30_000, weights, **RULES | {"classes": 16})
        assert sum(budgets) == 80 * 30_000
        assert len(set(budgets)) == 16

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"weights": (1, 2, 3)}, r"budget.weights: got 3 weights, but the model has 4 layers"),
            ({"weights": (1, 2, 0, 1)}, r"budget.weights\[2\]: got 0"),
            ({"weights": (1, math.nan, 1, 1)}, r"budget.weights\[1\]: got nan"),
            ({"weights": (1, math.inf, 1, 1)}, r"budget.weights\[1\]: got inf"),
            ({"mean": 4}, "mean budget: got 4 tokens, expected >= 5"),
            ({"num_layers": 0}, "number of layers: got 0"),
            ({"min_factor": 0.0}, "budget.min_factor: got 0.0"),
            ({"min_factor": 1.5}, "budget.min_factor: got 1.5"),
            ({"max_factor": 0.5}, "budget.max_factor: got 0.5"),
            ({"classes": 0}, "budget.classes: got 0"),
        ],
    )
    def test_arguments_out_of_range_are_refused_by_name(self, changes, expected):
        arguments = {"num_layers": 4, "mean": 33, "weights": (1, 2, 3, 4), **RULES, **changes}
        with pytest.raises(ConfigError, match=expected):
            layer_budgets(**arguments)


class TestFromConfig:
    def test_uniform_is_the_mean_of_scored_tokens(self):
        assert from_config(from_mapping({"budget": {"tokens": 48}}), 4) == (33, 33, 33, 33)

    @pytest.mark.parametrize("allocation", ["weights", "breakpoint"])
    def test_weights_shape_the_layers_with_the_rules_of_the_configuration(self, allocation):
        budget = {"tokens": 48, "allocation": allocation, "weights": [1, 2, 3, 50], "max_factor": 1.5, "classes": 2}
        config = from_mapping({"budget": budget, "retain": {"sinks": 6}})
        budgets = from_config(config, 4)
        assert budgets == layer_budgets(4, 33, (1, 2, 3, 50), 7, 0.25, 1.5, 2)
        assert sum(budgets) == 4 * config.scored
        assert max(budgets) <= 1.5 * 33

    def test_breakpoint_without_weights_starts_even(self):
        assert from_config(from_mapping({"budget": {"allocation": "breakpoint"}}), 2) == (716, 716)

    def test_a_list_is_taken_as_written_less_the_recent_window(self):
        layers = [40, 50, 60, 70, 80, 91]
        config = from_mapping({"budget": {"allocation": "list", "layers": layers, "classes": 2}})
        assert config.recent == 20
        assert from_config(config, 6) == (20, 30, 40, 50, 60, 71)

    def test_a_list_or_weights_for_another_model_are_refused_with_the_layer_count(self):
        config = from_mapping({"budget": {"allocation": "list", "layers": [40, 50]}})
        with pytest.raises(ConfigError, match=r"budget.layers: got 2 values, but the model has 28 layers"):
            from_config(config, 28)
        config = from_mapping({"budget": {"allocation": "weights", "weights": [1.0]}})
        with pytest.raises(ConfigError, match=r"budget.weights: got 1 weights, but the model has 28 layers"):
            from_config(config, 28)


class TestScale:
    def test_budgets_scale_in_proportion(self):
        assert scale((50, 50, 100, 200), base_mean=100, mean=50, floor=5) == (25, 25, 50, 100)
        assert scale((50, 50, 100, 200), base_mean=100, mean=400, floor=5) == (200, 200, 400, 800)

    def test_a_layer_held_up_by_the_floor_is_paid_for_by_the_others(self):
        assert scale((10, 90), base_mean=50, mean=20, floor=8) == (8, 32)

    @settings(deadline=None)
    @given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.integers(1, 16), st.integers(0, 5000), st.data())
    def test_the_bound_on_memory_the_floor_the_order_and_equality_hold(self, base, floor, above, data):
        mean = floor + above
        base_mean = data.draw(st.sampled_from([max(1, sum(base) // len(base)), -(-sum(base) // len(base))]))
        scaled = scale(base, base_mean, mean, floor)
        assert sum(scaled) <= len(base) * mean
        assert min(scaled) >= floor
        ranked = sorted(zip(base, scaled, strict=True))
        for (smaller, first), (larger, second) in pairwise(ranked):
            assert first <= second
            assert smaller < larger or first == second

    @given(st.integers(1, 2000), st.lists(st.floats(0.05, 1.0), min_size=1, max_size=24), st.integers(1, 4000))
    @settings(deadline=None)
    def test_little_of_a_requests_budget_is_lost_to_rounding(self, above, weights, mean):
        base = layer_budgets(len(weights), 5 + above, weights, **RULES)
        scaled = scale(base, 5 + above, 5 + mean, floor=5)
        assert len(weights) * (5 + mean) - sum(scaled) < len(weights)

    @given(st.integers(1, 2000), st.lists(st.floats(0.05, 1.0), min_size=1, max_size=24))
    @settings(deadline=None)
    def test_the_server_budget_scales_to_itself(self, above, weights):
        base = layer_budgets(len(weights), 5 + above, weights, **RULES)
        assert scale(base, 5 + above, 5 + above, floor=5) == base

    @pytest.mark.parametrize(
        "arguments", [((), 10, 10, 5), ((0, 10), 10, 10, 5), ((10, 10), 0, 10, 5), ((10, 10), 10, 4, 5)]
    )
    def test_arguments_out_of_range_are_refused(self, arguments):
        with pytest.raises(ConfigError):
            scale(*arguments)


def test_the_arithmetic_needs_neither_torch_nor_sglang():
    code = (
        "import sys, lethe_sglang.allocation.budgets;"
        "print([name for name in ('torch', 'sglang') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
