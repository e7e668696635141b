"""The pass that prunes one layer at a time, ``lethe sensitivity``, without its engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from profiles import MODEL, profile

from lethe_bench import one_layer
from lethe_bench.accuracy import prompts
from lethe_bench.one_layer import agreement, configuration, measure, pruned
from lethe_sglang.allocation import layer_budgets
from lethe_sglang.allocation.profile import Sensitivity, load, save
from lethe_sglang.cli import main as cli
from lethe_sglang.config import ConfigError, from_mapping
from lethe_sglang.config.changes import reconfigured
from lethe_sglang.profiling.run import Pass


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
        with pytest.raises(ConfigError, match=r"--budget: half of budget.tokens 12 is too small: "):
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

        found = measure(3, ask, kept, interval)
        assert asked == [None, 0, 1, 2]
        return found

    def test_every_layer_is_compared_with_the_uncompressed_model(self, capsys):
        found = self.run({0: {0: 50, 1: 30}, 2: {3: 0}})
        assert "16 of 16 answers" in capsys.readouterr().err
        assert found.changed == (0.5, 0.0, 0.25)
        assert found.lost == pytest.approx((0.25, 0.0, 0.25))
        assert (found.kept, found.prompts) == (20, 4)

    def test_answers_too_short_to_be_pruned_are_an_error(self):
        with pytest.raises(
            ConfigError, match=r"no answer has more than 100 tokens.*--max-new-tokens or a smaller --budget"
        ):
            self.run({}, kept=90, interval=10)


class TestCommand:
    FOUND = Sensitivity(kept=32, prompts=2, changed=(0.2, 0.0, 0.1, 0.1), lost=(0.1, 0.0, 0.0, 0.0))

    @pytest.fixture
    def asked(self, tmp_path, monkeypatch):
        """Put a fake pass in place; what it is asked for, task and prompts."""
        asked = []
        save(profile(rule="hoyer", hoyer=(0.9, 0.5, 0.7, 0.8)), tmp_path / "old.yaml")
        (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
        tokenizer = SimpleNamespace(chat_template=None, encode=lambda text: [len(text)])
        monkeypatch.setattr(prompts, "Prompts", lambda path: SimpleNamespace(tokenizer=tokenizer))
        monkeypatch.setattr(one_layer, "run", lambda task, ids, old: asked.append((task, ids)) or self.FOUND)
        monkeypatch.chdir(tmp_path)
        return asked

    def lethe(self, *arguments):
        return cli.main(["sensitivity", "old.yaml", "--model-path", "m", "-o", "new.yaml", *arguments])

    def test_the_statistic_and_its_rule_are_added_and_all_else_stays(self, asked, capsys):
        assert self.lethe("--prompts", "p.txt") == 0
        old, new = load(Path("old.yaml")), load(Path("new.yaml"))
        assert (new.rule, new.alpha, new.sensitivity, new.budgets.tokens) == ("sensitivity", 1.0, self.FOUND, 64)
        assert new.budgets.layers == tuple(20 + k for k in layer_budgets(44, [c + 0.1 for c in (0.2, 0, 0.1, 0.1)], 5))
        same = {"rule": old.rule, "sensitivity": None, "budgets": old.budgets}
        assert new.model_copy(update=same) == old
        printed = capsys.readouterr().out
        assert "changed, lost: 2 answers, one layer pruned to 32" in printed and "written to new.yaml" in printed

    def test_what_is_not_given_is_as_in_the_pass_of_the_profile(self, asked, tmp_path):
        config = '{"policy": "h2o"}'
        given = ("--num-prompts", "3", "--max-new-tokens", "9", "--seed", "0", "--raw", "--server-args=--tp 2")
        assert self.lethe("--prompts", "p.txt") == 0
        assert self.lethe("--prompts", "p.txt", "--config", config, "--budget", "80", "--alpha", "2", *given) == 0
        (first, two), (second, three) = asked
        file = {"model_path": "m", "prompts": Path("p.txt")}
        config = from_mapping({"budget": {"tokens": 64}})
        assert first == Pass(**file, num_prompts=2, max_new_tokens=256, seed=1, config=config)
        config = from_mapping({"policy": "h2o", "budget": {"tokens": 80}})
        more = {"raw": True, "server_args": ("--tp", "2"), "config": config}
        assert second == Pass(**file, num_prompts=3, max_new_tokens=9, seed=0, **more)
        assert (two, three) == ([[3], [3]], [[3], [3], [5]])
        assert load(Path("new.yaml")).alpha == 2.0

    def test_ctrl_c_leaves_the_profile_as_it_is(self, asked, monkeypatch, tmp_path, capsys):
        before = (tmp_path / "old.yaml").read_text()

        def stop(task, ids, old):
            raise KeyboardInterrupt

        monkeypatch.setattr(one_layer, "run", stop)
        assert self.lethe("--prompts", "p.txt") == 130
        assert capsys.readouterr().err == "lethe: interrupted\n"
        assert (tmp_path / "old.yaml").read_text() == before and not (tmp_path / "new.yaml").exists()

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--server-args=--kv-evict h2o"], "--server-args: '--kv-evict' is set by lethe sensitivity; use --config"),
            (["--model-path", "./nowhere"], "--model-path ./nowhere: no model there"),
            (["-o", "/dev/null/n.yaml"], "--out /dev/null/n.yaml: File exists; give a file"),
            (["--prompts", "nowhere.jsonl"], "--prompts nowhere.jsonl: cannot be read"),
        ],
    )
    def test_bad_options_are_one_line_before_anything_starts(self, asked, arguments, expected, capsys):
        assert self.lethe(*arguments) == 2 and not asked
        error = capsys.readouterr().err
        assert error.startswith(f"lethe sensitivity: error: {expected}") and error.count("\n") == 1

    def test_a_profile_of_another_model_is_refused_before_a_layer_is_pruned(self, monkeypatch):
        stopped = []
        engine = SimpleNamespace(shutdown=lambda: stopped.append(True))
        monkeypatch.setattr(one_layer, "start", lambda words: engine)
        monkeypatch.setattr(one_layer, "model_of", lambda engine: MODEL.model_copy(update={"weights": "sampled:9"}))
        monkeypatch.setattr(one_layer, "measure", lambda *given: pytest.fail("measured"))
        config = from_mapping({"budget": {"tokens": 64}})
        with pytest.raises(ConfigError, match=r"FILE: profile of another model \(toy\): weights"):
            one_layer.run(Pass(model_path="m", config=config), [[1, 2]], profile())
        assert stopped
