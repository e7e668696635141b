import subprocess
import sys
from itertools import combinations, pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from profiles import profile

from lethe_sglang.allocation import from_config, layer_budgets, scale
from lethe_sglang.config import ConfigError, from_mapping


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
    weights = draw(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=24))
    floor = draw(st.integers(1, 16))
    return draw(st.integers(floor, 2000)), weights, floor, draw(st.integers(1, 16))


class TestLayerBudgets:
    def test_without_weights_every_layer_gets_the_mean(self):
        assert layer_budgets(33, (1.0,) * 4, 5) == (33, 33, 33, 33)

    def test_budgets_are_proportional_to_the_weights(self):
        assert layer_budgets(100, (1, 1, 2, 4), 5) == (50, 50, 100, 200)
        assert layer_budgets(100, (4, 1, 2, 1), 5) == (200, 50, 100, 50)

    def test_what_a_bound_takes_or_frees_goes_to_the_other_layers_in_proportion(self):
        assert layer_budgets(100, (1, 1, 1, 97), 50) == (50, 50, 50, 250)
        assert layer_budgets(100, (1, 100, 100, 200), 5) == (25, 93, 93, 187)

    def test_no_layer_gets_less_than_a_quarter_or_more_than_four_times_the_mean(self):
        assert layer_budgets(33, (1, 100, 100, 100), 5) == (9, 41, 41, 41)
        assert layer_budgets(100, (1, 1, 1, 1, 1, 1, 1000), 5) == (50, 50, 50, 50, 50, 50, 400)

    def test_means_are_rounded_down(self):
        assert layer_budgets(10, (1, 1, 2, 2), 5) == (6, 6, 13, 13)

    def test_classes_are_cut_where_the_shares_are_far_apart(self):
        budgets = layer_budgets(100, (1.0, 1.02, 0.98, 3.0, 3.1, 2.9), 5, classes=2)
        assert budgets == (50, 50, 50, 150, 150, 150)

    @pytest.mark.parametrize("classes", [1, 2, 3])
    def test_the_classes_of_a_small_model_are_as_near_to_the_shares_as_any(self, classes):
        weights = [0.9, 0.2, 0.35, 0.5, 0.21, 0.88, 0.35]
        shares = sorted(exact_shares(2000, weights, 500, 8000))

        def runs(cut):
            return [shares[a:b] for a, b in pairwise((0, *cut, 7))]

        def distance(cut):
            return sum((share - sum(run) / len(run)) ** 2 for run in runs(cut) for share in run)

        best = min(combinations(range(1, 7), classes - 1), key=distance)
        expected = [int(sum(run) / len(run) + 1e-6) for run in runs(best) for _ in run]
        assert sorted(layer_budgets(2000, weights, 5, classes)) == expected

    @pytest.mark.parametrize("classes", range(1, 13))
    def test_no_more_classes_are_made_than_allowed(self, classes):
        budgets = layer_budgets(700, [0.1 + 0.05 * layer * layer for layer in range(12)], 5, classes)
        assert 12 * 699 < sum(budgets) <= 12 * 700
        assert len(set(budgets)) == min(classes, 9), "four layers lie at the smallest share"

    def test_order_is_kept_where_only_a_few_values_are_legal(self):
        weights = (0.63, 0.03, 0.06, 0.4, 0.95, 0.59, 0.16, 0.02, 0.3, 0.09, 0.79)
        budgets = layer_budgets(3, weights, 2, 3)
        ranked = [budget for _, budget in sorted(zip(weights, budgets, strict=True))]
        assert ranked == sorted(ranked) and min(ranked) == 2
        assert 22 < sum(budgets) <= 33

    @settings(deadline=None)
    @given(cases())
    def test_the_sum_is_within_the_mean_and_loses_less_than_a_token_a_layer(self, case):
        mean, weights, floor, classes = case
        budgets = layer_budgets(mean, weights, floor, classes)
        assert (mean - 1) * len(weights) < sum(budgets) <= mean * len(weights)

    @settings(deadline=None)
    @given(cases())
    def test_the_bounds_hold_and_the_classes_are_few(self, case):
        mean, weights, floor, classes = case
        budgets = layer_budgets(mean, weights, floor, classes)
        assert min(budgets) >= max(floor, 0.25 * mean)
        assert max(budgets) <= 4 * mean
        assert len(set(budgets)) <= classes

    @settings(deadline=None)
    @given(cases(), st.data())
    def test_a_larger_weight_never_gets_a_smaller_budget_and_equal_weights_get_equal_ones(self, case, data):
        mean, weights, floor, classes = case
        weights += data.draw(st.lists(st.sampled_from(weights), max_size=8))
        ranked = sorted(zip(weights, layer_budgets(mean, weights, floor, classes), strict=True))
        for (light, small), (heavy, large) in pairwise(ranked):
            assert small <= large
            assert light < heavy or small == large

    @settings(deadline=None)
    @given(cases())
    def test_with_enough_classes_every_budget_is_its_share_rounded_down(self, case):
        mean, weights, floor, _ = case
        low = max(floor, -(-mean // 4))
        assume(low <= mean)
        budgets = layer_budgets(mean, weights, floor, 2 * len(weights))
        for budget, share in zip(budgets, exact_shares(mean, weights, low, 4 * mean), strict=True):
            assert -1e-6 < share - budget < 1 + 1e-6

    @settings(deadline=None)
    @given(cases(), st.sampled_from([0.5, 2.0, 1024.0]))
    def test_only_the_ratios_of_the_weights_matter(self, case, factor):
        mean, weights, floor, classes = case
        scaled = [weight * factor for weight in weights]
        assert layer_budgets(mean, weights, floor, classes) == layer_budgets(mean, scaled, floor, classes)

    def test_extreme_weights_reach_the_bounds_and_keep_the_mean(self):
        assert layer_budgets(100, (1e-300, 1e300, 1e-300), 5) == (25, 250, 25)

    def test_eighty_layers_are_shared_in_good_time(self):
        budgets = layer_budgets(30_000, [0.1 + (layer * 37 % 80) / 80 for layer in range(80)], 5, 16)
        assert 80 * 29_999 < sum(budgets) <= 80 * 30_000
        assert len(set(budgets)) == 16


class TestFromConfig:
    def test_uniform_is_the_mean_of_scored_tokens(self):
        assert from_config(from_mapping({"budget": {"tokens": 48}}), 4) == (33, 33, 33, 33)

    @pytest.mark.parametrize("allocation", ["profile", "breakpoint"])
    def test_a_profile_shapes_the_layers_with_the_floor_of_the_configuration(self, allocation):
        budget = {"tokens": 48, "allocation": allocation, "profile": "mine.yaml"}
        config = from_mapping({"budget": budget, "retain": {"sinks": 12}})
        budgets = from_config(config, 4, profile(concentration=(1.0, 2.0, 3.0, 50.0)))
        assert budgets == layer_budgets(33, (1, 2, 3, 50), 13)
        assert min(budgets) == 13 and 4 * 32 < sum(budgets) <= 4 * config.scored

    @pytest.mark.parametrize("source", ["auto", "none"])
    def test_breakpoint_without_a_profile_of_its_own_starts_even(self, source):
        config = from_mapping({"budget": {"allocation": "breakpoint", "profile": source}})
        assert from_config(config, 2) == (716, 716) and not config.budget.reads_profile

    def test_a_list_is_taken_as_written_less_the_recent_window(self):
        layers = [40, 50, 60, 70, 80, 91]
        config = from_mapping({"budget": {"allocation": "list", "layers": layers}})
        assert config.recent == 20
        assert from_config(config, 6) == (20, 30, 40, 50, 60, 71)

    def test_a_list_for_another_model_is_refused_with_the_layer_count(self):
        config = from_mapping({"budget": {"allocation": "list", "layers": [40, 50]}})
        with pytest.raises(ConfigError, match=r"budget.layers: got 2 values, but the model has 28 layers"):
            from_config(config, 28)


class TestScale:
    def test_budgets_scale_in_proportion(self):
        assert scale((50, 50, 100, 200), mean=50, floor=5) == (25, 25, 50, 100)
        assert scale((50, 50, 100, 200), mean=400, floor=5) == (200, 200, 400, 800)

    def test_a_layer_held_up_by_the_floor_is_paid_for_by_the_others(self):
        assert scale((10, 90), mean=20, floor=8) == (8, 32)

    @settings(deadline=None)
    @given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.integers(1, 16), st.integers(0, 5000))
    def test_the_bound_on_memory_the_floor_the_order_and_equality_hold(self, base, floor, above):
        mean = floor + above
        scaled = scale(base, mean, floor)
        assert sum(scaled) <= len(base) * mean
        assert min(scaled) >= floor
        ranked = sorted(zip(base, scaled, strict=True))
        for (smaller, first), (larger, second) in pairwise(ranked):
            assert first <= second
            assert smaller < larger or first == second

    @given(st.integers(1, 2000), st.lists(st.floats(0.05, 1.0), min_size=1, max_size=24), st.integers(1, 4000))
    @settings(deadline=None)
    def test_little_of_a_requests_budget_is_lost_to_rounding(self, above, weights, mean):
        base = layer_budgets(5 + above, weights, floor=5)
        scaled = scale(base, 5 + mean, floor=5)
        assert len(weights) * (5 + mean) - sum(scaled) < len(weights)

    @given(st.integers(1, 2000), st.lists(st.floats(0.05, 1.0), min_size=1, max_size=24))
    @settings(deadline=None)
    def test_the_server_budget_scales_to_itself_and_what_rounding_had_lost(self, above, weights):
        base = layer_budgets(5 + above, weights, floor=5)
        scaled = scale(base, 5 + above, floor=5)
        assert all(small <= large for small, large in zip(base, scaled, strict=True))
        assert sum(base) < (5 + above) * len(base) or scaled == base


def test_the_arithmetic_needs_neither_torch_nor_sglang():
    code = (
        "import sys, lethe_sglang.allocation.budgets;"
        "print([name for name in ('torch', 'sglang') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
