"""The artifact, the rules that read it, and how it is shown."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import yaml
from profiles import MODEL, profile

from lethe_sglang.allocation import from_config, layer_budgets
from lethe_sglang.allocation.fingerprint import fingerprint_of
from lethe_sglang.allocation.profile import STATISTICS, Fidelity, Rule, load, save
from lethe_sglang.allocation.rules import RULES, weights
from lethe_sglang.cli import main as cli
from lethe_sglang.config import ConfigError, from_mapping, resolve
from lethe_sglang.files import write_atomically

ROOT = Path(__file__).parents[2]
FORCED = {"kept": 50, "tokens": 200, "documents": 6}
HOYER = (0.9, 0.5, 0.7, 0.8)


class TestArtifact:
    def test_what_is_saved_loads_to_the_same_profile(self, tmp_path):
        made = profile(hoyer=HOYER, coverage_95=(10.0, 40.0, 20.0, 12.5))
        save(made, tmp_path / "new" / "p.yaml")
        assert load(tmp_path / "new" / "p.yaml") == made
        assert [p.name for p in (tmp_path / "new").iterdir()] == ["p.yaml"], "a draft stayed behind"

    def test_a_failed_write_leaves_the_old_file_and_no_draft(self, tmp_path, monkeypatch):
        path = tmp_path / "p.yaml"
        path.write_text("old")
        monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "new")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_every_statistic_has_a_meaning_and_is_required(self, tmp_path):
        data = profile().model_dump(mode="json")
        del data["statistics"]["recurrence"]
        (tmp_path / "p.yaml").write_text(json.dumps(data))
        with pytest.raises(ConfigError, match=r"statistics\.recurrence: missing"):
            load(tmp_path / "p.yaml")
        assert all(STATISTICS.values())

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "not a profile; make one with lethe profile"),
            ("[1, 2]", "not a profile"),
            ("format: 2\nmodel: {", "not YAML; make it again with lethe profile"),
            ("\x00\x01", "not YAML"),
            ("format: 1", "format 1, this version reads format 2; make it again with lethe profile"),
            ("format: 2", "rule: Field required; make it again"),
        ],
    )
    def test_a_file_that_is_no_profile_is_refused_in_one_line(self, tmp_path, text, expected):
        path = tmp_path / "p.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load(path, "budget.profile p.yaml")
        assert str(caught.value).startswith("budget.profile p.yaml: ") and expected in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1

    def test_a_missing_file_says_how_to_make_it(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot be read: No such file or directory; make it with lethe profile"):
            load(tmp_path / "nowhere.yaml")

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda d: d["statistics"]["entropy"].update(mean=[1.0]), "statistics.entropy: got 1 values for 4 layers"),
            (lambda d: d["statistics"]["hoyer"].update(mean=[0.1, 0.2, 1.5, 0.3]), "statistics.hoyer: outside"),
            (
                lambda d: d.update(sensitivity={"kept": 8, "prompts": 2, "changed": [0.0] * 3, "lost": [0.0] * 4}),
                "sensitivity.changed: got 3 values for 4 layers",
            ),
            (lambda d: d["budgets"].update(layers=[9]), "budgets.layers: got 1 values for 4 layers"),
            (lambda d: d.update(rule="profiled"), "rule: Input should be 'concentration', 'sensitivity', 'hoyer'"),
            (lambda d: d.update(rule="sensitivity"), "rule sensitivity: the profile has none; measure it with lethe"),
            (lambda d: d.update(rule="fidelity"), "rule fidelity: the profile has none; measure it with lethe eval"),
            (
                lambda d: d.update(fidelity={**FORCED, "kl": [0.0] * 4, "recall": [0.0] * 3}),
                "fidelity.recall: got 3 values for 4 layers",
            ),
            (lambda d: d.update(alpha=17), "alpha: Input should be less than or equal to 16"),
            (lambda d: d.update(extra=1), "extra: Extra inputs are not permitted"),
        ],
    )
    def test_contradictions_are_named(self, tmp_path, change, expected):
        data = profile().model_dump(mode="json")
        change(data)
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(data))
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / "p.yaml")
        assert expected in str(caught.value)


class TestFingerprint:
    @pytest.mark.parametrize(
        ("field", "value", "named"),
        [
            ("architecture", "OtherForCausalLM", "architecture ToyForCausalLM against OtherForCausalLM"),
            ("layers", 28, "layers 4 against 28"),
            ("heads", 16, "query heads 2 against 16"),
            ("kv_heads", 2, "KV heads 1 against 2"),
            ("head_dim", 128, "head width 64 against 128"),
            ("config_hash", "dead", "hash of the model's configuration c0ffee against dead"),
            ("weights", "sampled:9999", "weights sampled:1234 against sampled:9999"),
        ],
    )
    def test_a_profile_of_another_model_is_refused_with_what_differs(self, field, value, named):
        other = MODEL.model_copy(update={field: value, "name": "other"})
        with pytest.raises(ConfigError) as caught:
            profile().check(other, "budget.profile p.yaml")
        message = str(caught.value)
        assert message.startswith("budget.profile p.yaml: profile of another model (toy): ")
        assert named in message and "lethe profile --model-path other" in message
        assert MODEL.key != other.key

    def test_the_servers_own_arguments_make_no_other_model(self):
        config = pytest.importorskip("sglang.srt.configs.model_config")
        resolved = SimpleNamespace(dtype="auto")
        found = [
            fingerprint_of(config.ModelConfig(str(ROOT / "models" / "reasoner"), **options), resolved)
            for options in ({}, {"context_length": 1000}, {"language_only": True}, {"encoder_only": True})
        ]
        assert len({model.key for model in found}) == 1
        committed = load(ROOT / "docs" / "results" / "allocation" / "profile.yaml")
        committed.check(found[1], "the profile that the results are of")
        other = config.ModelConfig(
            str(ROOT / "models" / "reasoner"), model_override_args=json.dumps({"rope_theta": 9e4, "hidden_act": "gelu"})
        )
        assert fingerprint_of(other, resolved).key != found[0].key

    def test_the_same_model_under_another_name_or_number_format_is_accepted(self):
        other = MODEL.model_copy(update={"name": "copy", "dtype": "bfloat16", "quantization": "awq"})
        profile().check(other, "p")
        assert MODEL.numeric_differences(other) == ["dtype float32 against bfloat16", "quantization None against awq"]
        assert MODEL.key != other.key, "but a cache keeps one of each"
        assert MODEL.key == MODEL.model_copy(update={"name": "copy"}).key

    @pytest.mark.parametrize("weights", ["", "revision:abc"])
    def test_weights_are_compared_with_their_like_only(self, weights):
        assert not MODEL.differences(MODEL.model_copy(update={"weights": weights}))


class TestRules:
    def test_a_file_may_name_every_rule_there_is_and_no_other(self):
        assert get_args(Rule) == tuple(RULES)

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, -1.0])
    def test_hoyer_is_one_minus_sparsity_to_the_alpha(self, alpha):
        found = weights(profile(rule="hoyer", alpha=alpha, hoyer=HOYER))
        plain = [(1 - h) ** alpha for h in HOYER]
        assert found == pytest.approx([w / max(plain) for w in plain])

    @pytest.mark.parametrize("alpha", [1.0, 0.5, -1.0])
    def test_concentration_gives_more_where_few_tokens_get_most_of_the_attention(self, alpha):
        found = weights(profile(rule="concentration", alpha=alpha, concentration=(3.0, 1.0, 2.0, 5.0)))
        plain = [v**alpha for v in (3.0, 1.0, 2.0, 5.0)]
        assert found == pytest.approx([w / max(plain) for w in plain])

    def test_sensitivity_shares_half_of_the_budget_by_what_pruning_changes(self):
        found = weights(profile(rule="sensitivity", changed=(0.4, 0.0, 0.1, 0.3)))
        assert found == pytest.approx([1.0, 1 / 3, 0.5, 5 / 6])
        assert weights(profile(rule="sensitivity", changed=(0.0,) * 4)) == (1.0,) * 4, "nothing changed at all"

    def test_fidelity_shares_by_what_pruning_costs_in_both_measures(self):
        measured = profile().model_copy(update={"rule": "fidelity"})

        def found(kl, recall):
            return weights(measured.model_copy(update={"fidelity": Fidelity(**FORCED, kl=kl, recall=recall)}))

        parts = [0.4 + 0.75, 0.1 + 0.25, 0.5, 0.0]
        assert found((4.0, 1.0, 5.0, -0.1), (0.3, 0.1, -0.2, 0.0)) == pytest.approx(
            [p / max(parts) for p in parts], abs=1e-6
        )
        assert found((4.0, 1.0, 5.0, 2.0), (0.0,) * 4) == pytest.approx([0.8, 0.2, 1.0, 0.4]), "no values were recalled"
        assert found((0.0,) * 4, (-0.1,) * 4) == (1.0,) * 4, "nothing costs anything"

    def test_recurrence_gives_more_where_tokens_come_back(self):
        assert weights(profile(rule="recurrence", recurrence=(0.1, 0.2, 0.4, 0.3))) == pytest.approx(
            [0.25, 0.5, 1, 0.75]
        )

    def test_d2o_gives_less_to_layers_of_concentrated_attention(self):
        found = weights(profile(rule="d2o", concentration=(3.0, 1.0, 2.0, 5.0)))
        assert found == pytest.approx([math.exp(-x) for x in (0.5, 0.0, 0.25, 1.0)])

    def test_cake_multiplies_entropy_and_fluctuation(self):
        found = weights(profile(rule="cake", entropy=(1.0, 2.0, 3.0, 4.0), fluctuation=(0.4, 0.3, 0.2, 0.1)))
        assert found == pytest.approx([0.4 / 0.6, 1.0, 1.0, 0.4 / 0.6])

    def test_zipvl_counts_the_tokens_that_hold_95_percent(self):
        found = weights(profile(rule="zipvl", coverage_95=(10.0, 40.0, 20.0, 5.0)))
        assert found == pytest.approx([0.25, 1.0, 0.5, 0.125])

    def test_pyramid_is_linear_with_beta_20_and_mean_1(self):
        def of(layers):
            return profile(MODEL.model_copy(update={"layers": layers}), rule="pyramid")

        assert RULES["pyramid"](of(5)) == pytest.approx([1.95, 1.475, 1.0, 0.525, 0.05])
        assert weights(of(5)) == pytest.approx([w / 1.95 for w in (1.95, 1.475, 1.0, 0.525, 0.05)])
        assert RULES["pyramid"](of(1)) == [1.0]

    @pytest.mark.parametrize("alpha", [3.0, -3.0])
    @pytest.mark.parametrize("rule", RULES)
    def test_extreme_statistics_still_give_positive_weights(self, rule, alpha):
        extreme = profile(
            rule=rule,
            alpha=alpha,
            hoyer=(1.0, 1.0, 0.0, 1.0),
            concentration=(0.0,) * 4,
            entropy=(0.0,) * 4,
            coverage_95=(0.0, 0.0, 1e6, 1.0),
            changed=(0.0, 0.0, 0.0, 1.0),
        )
        found = weights(extreme)
        assert len(found) == 4 and all(0 < w <= 1 and math.isfinite(w) for w in found)

    @pytest.mark.parametrize("rule", RULES)
    def test_every_rule_shares_the_budget_within_its_bounds(self, rule):
        measured = profile(
            rule=rule,
            hoyer=HOYER,
            concentration=HOYER,
            entropy=HOYER,
            coverage_95=(10.0, 40.0, 20.0, 5.0),
            changed=HOYER,
            recurrence=HOYER,
        )
        config = from_mapping({"budget": {"tokens": 100, "allocation": "profile"}})
        budgets = from_config(config, 4, measured)
        assert 4 * (config.scored - 1) < sum(budgets) <= 4 * config.scored
        assert min(budgets) >= 0.25 * config.scored and max(budgets) <= 4 * config.scored
        assert len(set(budgets)) > 1, "the rule made no difference"

    def test_a_sparse_layer_gets_a_small_budget(self):
        config = from_mapping({"budget": {"tokens": 100, "allocation": "profile"}})
        budgets = from_config(config, 4, profile(rule="hoyer", alpha=2.0, hoyer=HOYER))
        assert budgets == layer_budgets(70, [(1 - h) ** 2 for h in HOYER], 5)
        assert sorted(range(4), key=budgets.__getitem__) == [0, 3, 2, 1]

    def test_no_profile_and_profile_none_are_errors(self):
        budget = {"tokens": 100, "allocation": "profile"}
        with pytest.raises(ConfigError, match=r"budget.profile: got none, but budget.allocation profile needs one"):
            from_mapping({"budget": {**budget, "profile": "none"}})
        with pytest.raises(ConfigError, match=r"budget.allocation profile: needs a profile; set budget.profile"):
            from_config(from_mapping({"budget": budget}), 4)
        with pytest.raises(ConfigError, match=r"budget.profile: has 4 layers, but the model has 6"):
            from_config(from_mapping({"budget": budget}), 6, profile())


class TestRewriting:
    """``lethe profile --from``: another rule for what was measured before."""

    def rewrite(self, tmp_path, *arguments, measured=None):
        save(measured or profile(hoyer=HOYER, concentration=(1.0, 2.0, 3.0, 4.0)), tmp_path / "old.yaml")
        return cli.main(["profile", "--from", str(tmp_path / "old.yaml"), *arguments])

    def test_only_the_rule_and_its_budgets_change(self, tmp_path, capsys):
        assert self.rewrite(tmp_path, "--rule", "hoyer", "--alpha", "-1", "-o", str(tmp_path / "new" / "n.yaml")) == 0
        old, new = load(tmp_path / "old.yaml"), load(tmp_path / "new" / "n.yaml")
        assert (new.rule, new.alpha, new.budgets.tokens) == ("hoyer", -1.0, 64)
        assert new.budgets.layers == tuple(20 + k for k in layer_budgets(44, [1 / (1 - h) for h in HOYER], 5))
        same = {"rule": old.rule, "alpha": old.alpha, "budgets": old.budgets}
        assert new.model_copy(update=same) == old
        printed = capsys.readouterr().out
        assert "budget by hoyer ** -1" in printed and "written to" in printed

    def test_the_rule_stays_unless_given_and_the_budget_may_be_another(self, tmp_path):
        arguments = ("--budget", "200", "--config", '{"retain": {"recent_ratio": 0.5}}', "-o", str(tmp_path / "n.yaml"))
        assert self.rewrite(tmp_path, *arguments, measured=profile(rule="zipvl")) == 0
        new = load(tmp_path / "n.yaml")
        assert (new.rule, new.alpha, new.budgets.tokens, new.budgets.layers) == ("zipvl", 1.0, 200, (200,) * 4)

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["-o", "n.yaml", "--num-prompts", "3"], "--num-prompts: nothing is measured with --from; leave it out"),
            (["-o", "n.yaml", "--raw"], "--raw: nothing is measured with --from; leave it out"),
            ([], "--out: needed with --from"),
            (["-o", "n.yaml", "--rule", "fidelity"], "--rule fidelity: the profile has none; measure it with lethe ev"),
            (
                ["-o", "n.yaml", "--rule", "sensitivity"],
                "--rule sensitivity: the profile has none; measure it with lethe s",
            ),
            (["-o", "/dev/null/n.yaml"], "--out /dev/null/n.yaml: File exists; give a file"),
        ],
    )
    def test_what_makes_no_sense_is_one_line(self, tmp_path, monkeypatch, capsys, arguments, expected):
        monkeypatch.chdir(tmp_path)
        assert self.rewrite(tmp_path, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"lethe profile: error: {expected}") and error.count("\n") == 1
        assert not (tmp_path / "n.yaml").exists()

    def test_a_file_that_is_no_profile_is_named(self, tmp_path, capsys):
        out = str(tmp_path / "n.yaml")
        assert cli.main(["profile", "--from", str(tmp_path / "nowhere.yaml"), "-o", out]) == 2
        assert "nowhere.yaml: cannot be read: No such file or directory" in capsys.readouterr().err


class TestFlag:
    def test_the_flag_beats_the_file_and_asks_for_a_profile(self):
        assert resolve("lethe", None, None, "mine.yaml").budget.model_dump(include={"allocation", "profile"}) == {
            "allocation": "profile",
            "profile": "mine.yaml",
        }
        config = resolve("lethe", '{"budget": {"allocation": "profile", "profile": "other.yaml"}}', 64, "auto")
        assert (config.budget.allocation, config.budget.profile, config.budget.tokens) == ("profile", "auto", 64)

    def test_the_flag_none_gives_all_layers_alike(self):
        for source in (None, '{"budget": {"allocation": "profile", "profile": "other.yaml"}}'):
            budget = resolve("lethe", source, None, "none").budget
            assert (budget.allocation, budget.profile, budget.reads_profile) == ("uniform", "none", False)
        budget = resolve("lethe", '{"budget": {"allocation": "list", "layers": [40, 50]}}', None, "none").budget
        assert budget.layers == (40, 50)

    def test_breakpoint_reads_a_file_but_measures_nothing_by_itself(self):
        source = '{"budget": {"allocation": "breakpoint"}}'
        assert resolve("lethe", source, None, "p.yaml").budget.reads_profile
        with pytest.raises(ConfigError, match=r"--kv-evict-profile auto: not read by budget.allocation breakpoint"):
            resolve("lethe", source, None, "auto")

    def test_a_flag_that_nothing_reads_is_refused(self):
        uniform = {"budget": {"allocation": "uniform"}}
        with pytest.raises(ConfigError, match=r"--kv-evict-profile p.yaml: not read by budget.allocation uniform"):
            resolve("lethe", json.dumps(uniform), None, "p.yaml")
        assert resolve("lethe", '{"budget": {"allocation": "profile"}}', None, "p.yaml").budget.profile == "p.yaml"


class TestShow:
    def test_a_table_has_a_row_a_layer(self, tmp_path, capsys):
        save(profile(hoyer=HOYER, changed=(0.4, 0.0, 0.1, 0.3)), tmp_path / "a.yaml")
        assert cli.main(["show", "profile", str(tmp_path / "a.yaml")]) == 0
        printed = capsys.readouterr().out
        rows = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
        assert [row[:2] for row in rows[-4:]] == [["0", "0.900"], ["1", "0.500"], ["2", "0.700"], ["3", "0.800"]]
        assert rows[-4][-3:] == ["0.400", "0.200", "64"], "changed, lost and the budget"

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["profil", "x"], "lethe show profil x: not known; write lethe show profile FILE"),
            (["profile"], "lethe show profile: not known"),
            (["profile", "x", "y"], "lethe show profile x y: not known; write lethe show profile FILE (lethe profiles"),
            (["profile", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
            (["profile", "x.yaml", "--kv-evict", "h2o"], "lethe show profile: takes no option"),
            (["profile", "x.yaml", "--presets"], "lethe show profile: takes no option"),
        ],
    )
    def test_a_bad_request_is_one_line(self, arguments, expected, capsys):
        assert cli.main(["show", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"lethe show: error: {expected}") and error.count("\n") == 1


def test_reading_a_profile_needs_neither_torch_nor_sglang():
    code = "import sys, lethe_sglang.cli.show_profile; print([n for n in ('torch', 'sglang') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
