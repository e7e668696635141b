"""The pass that prunes one layer at a time, without its engine."""

from __future__ import annotations

import io

import pytest

from lethe_sglang.config import ConfigError, from_mapping
from lethe_sglang.config.changes import reconfigured
from lethe_sglang.profiling.progress import Progress
from lethe_sglang.profiling.sensitivity import agreement, configuration, measure, pruned


@pytest.mark.parametrize(
    ("whole", "pruned", "expected"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [9, 2, 3, 4], 0.0),
        ([1, 2, 3, 4], [1, 2, 9, 4], 0.5),
        ([1, 2, 3, 4], [1, 2], 0.5),
        ([1, 2], [1, 2, 3, 4], 0.5),
        ([], [], 1.0),
    ],
)
def test_answers_agree_up_to_the_first_token_that_differs(whole, pruned, expected):
    assert agreement(whole, pruned) == expected


class TestConfiguration:
    def test_one_layer_alone_is_pruned_to_half_the_budget(self):
        config = configuration(from_mapping({"policy": "h2o", "budget": {"tokens": 80}}), 3, 500)
        assert config.policy == "h2o"
        each = [reconfigured(config, pruned(layer, 40, 3, 500)) for layer in range(3)]
        assert [one.budget.layers for one in each] == [(40, 500, 500), (500, 40, 500), (500, 500, 40)]
        assert each[0] == config and {one.recent for one in each} == {20}
        assert config.requests.allow_off, "the reference is asked without eviction"

    def test_rounds_retention_and_scores_are_the_servers(self):
        given = {
            "budget": {"tokens": 200, "allocation": "uniform"},
            "rounds": {"interval": 9},
            "lethe": {"half_life": 5.0},
            "retain": {"sinks": 2, "own_sinks": 3, "recent_ratio": 0.7},
            "requests": {"allow_off": False},
        }
        config = configuration(from_mapping(given), 4, 1000)
        assert (config.rounds.interval, config.built_policy.half_life) == (9, 5.0)
        assert (config.retain.sinks, config.retain.own_sinks, config.recent) == (2, 3, 50)

    def test_a_budget_that_is_too_small_is_an_error_of_the_option(self):
        with pytest.raises(ConfigError, match=r"--sensitivity: half of budget.tokens 12 is too small: "):
            configuration(from_mapping({"budget": {"tokens": 12}}), 4, 100)


WHOLE = [list(range(100)), list(range(60)), list(range(80)), list(range(40))]


class TestMeasure:
    def run(self, changes, kept=20, interval=8):
        """Ask with answers that differ from the uncompressed ones at the given places of each layer."""
        asked = []

        def ask(layer):
            asked.append(layer)
            answers = [list(ids) for ids in WHOLE]
            for prompt, place in changes.get(layer, {}).items():
                answers[prompt][place] = -1
            return answers

        out = io.StringIO()
        found = measure(3, ask, kept, interval, Progress(16, out, "answers"))
        assert asked == [None, 0, 1, 2]
        assert "16 of 16 answers" in out.getvalue()
        return found

    def test_every_layer_is_compared_with_the_uncompressed_model(self):
        found = self.run({0: {0: 50, 1: 30}, 2: {3: 0}})
        assert found.changed == (0.5, 0.0, 0.25)
        assert found.lost == pytest.approx((0.25, 0.0, 0.25))
        assert (found.kept, found.prompts) == (20, 4)

    def test_answers_too_short_to_be_pruned_are_an_error(self):
        with pytest.raises(
            ConfigError, match=r"no answer has more than 100 tokens.*--max-new-tokens or a smaller --budget"
        ):
            self.run({}, kept=90, interval=10)
