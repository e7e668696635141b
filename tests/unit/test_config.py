import dataclasses
import json
import math
import pickle
import shutil
import subprocess
import sys
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lethe_sglang.config import (
    ConfigError,
    EvictionConfig,
    RequestOverride,
    from_mapping,
    parse_request,
    presets,
    resolve,
)
from lethe_sglang.config import loading as loading_module
from lethe_sglang.config.errors import known_keys
from lethe_sglang.config.policy_section import laid_over
from lethe_sglang.config.replaced import REPLACED
from lethe_sglang.config.schema import BudgetConfig
from lethe_sglang.policies import policy_class, policy_names

LIST_BUDGET = {"allocation": "list", "layers": [40, 60, 81]}
KNOWN = known_keys(EvictionConfig, **{name: policy_class(name) for name in policy_names()})
KEYS = st.sampled_from([key for keys in KNOWN.values() for key in keys] + list(REPLACED)) | st.text(max_size=5)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)


def message(data: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        from_mapping(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def error_of(data: dict) -> ConfigError | None:
    try:
        from_mapping(data)
    except ConfigError as error:
        return error
    return None


def request_message(asked: object, config: EvictionConfig | None = None, context_length: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_request({"kv_evict": asked}, config or EvictionConfig(), context_length)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestSchema:
    def test_the_recent_window_is_rounded_up_and_the_rest_is_scored(self):
        config = from_mapping({"budget": {"tokens": 48}})
        assert (config.recent, config.scored) == (15, 33)

    def test_the_ratio_counts_as_the_decimal_that_was_written(self):
        assert math.ceil(0.07 * 100) == 8
        assert from_mapping({"budget": {"tokens": 100}, "retain": {"recent_ratio": 0.07}}).recent == 7

    @settings(deadline=None)
    @given(st.integers(2, 100_000), st.integers(0, 64), st.floats(0.01, 0.99))
    def test_a_budget_is_legal_exactly_from_the_smallest_that_the_message_names(self, tokens, sinks, ratio):
        def build(tokens: int) -> EvictionConfig:
            return from_mapping({"budget": {"tokens": tokens}, "retain": {"sinks": sinks, "recent_ratio": ratio}})

        try:
            config = build(tokens)
        except ConfigError as error:
            smallest = int(str(error).split("smallest legal value is ")[1].split()[0])
            assert smallest > tokens
            assert build(smallest).scored == sinks + 1
            if smallest > 2:
                with pytest.raises(ConfigError):
                    build(smallest - 1)
        else:
            assert config.scored > sinks
            assert config.recent + config.scored == tokens

    def test_the_section_of_the_policy_in_use_sets_its_options(self):
        config = from_mapping({"policy": "snapkv", "snapkv": {"kernel": 3}})
        assert config.built_policy == policy_class("snapkv")(window=32, kernel=3)
        assert config.built_policy != from_mapping({"policy": "snapkv"}).built_policy
        assert from_mapping({"policy": "h2o", "h2o": {}}) == from_mapping({"policy": "h2o"})
        assert EvictionConfig(lethe={"half_life": 7}) == from_mapping({"lethe": {"half_life": 7}}) != EvictionConfig()

    @pytest.mark.parametrize("name", policy_names())
    def test_a_configuration_is_dumped_with_all_options_of_its_policy_and_reads_back(self, name):
        config = from_mapping({"policy": name, "rounds": {"interval": 7}})
        options = {key: getattr(config.built_policy, key) for key in KNOWN[name]}
        for mode in ("python", "json"):
            for unset in (False, True):
                dumped = config.model_dump(mode=mode, exclude_unset=unset)
                assert dumped.get(name, {}) == options and next(iter(dumped)) == "policy"
                assert from_mapping(dumped) == config
        assert from_mapping(json.loads(config.model_dump_json())) == config
        assert pickle.loads(pickle.dumps(config)).built_policy == config.built_policy

    def test_where_the_policy_changes_the_section_of_the_old_one_goes(self):
        base = from_mapping({"lethe": {"half_life": 7}, "rounds": {"interval": 9}}).model_dump()
        assert from_mapping(laid_over(base, {"lethe": {"score_every": 2}})).built_policy == (
            policy_class("lethe")(half_life=7, score_every=2)
        )
        changed = from_mapping(laid_over(base, {"policy": "snapkv", "snapkv": {"window": 4}}))
        assert (changed.built_policy, changed.rounds.interval) == (policy_class("snapkv")(window=4), 9)

    def test_a_list_of_budgets_sets_the_mean(self):
        config = from_mapping({"budget": LIST_BUDGET})
        assert config.budget.tokens == 60
        assert from_mapping({"budget": {**LIST_BUDGET, "tokens": 60}}) == config

    def test_a_list_that_contradicts_tokens_is_refused(self):
        assert "budget.tokens: got 61" in message({"budget": {**LIST_BUDGET, "tokens": 61}})

    def test_a_layer_of_a_list_without_room_for_its_sinks_is_refused_with_its_number(self):
        assert "budget.layers[1]: got 20" in message({"budget": {"allocation": "list", "layers": [100, 20, 100]}})
        from_mapping({"budget": {"allocation": "list", "layers": [100, 28, 100]}})
        assert "smallest legal value is 28" in message({"budget": {"allocation": "list", "layers": [101, 27, 100]}})

    @pytest.mark.parametrize(
        ("budget", "option"),
        [
            ({"allocation": "list"}, "budget.layers: required"),
            ({"layers": [1024]}, "budget.layers: not used"),
            ({"allocation": "breakpoint", "layers": [1024]}, "budget.layers: not used"),
        ],
    )
    def test_layers_go_with_their_allocation_only(self, budget, option):
        assert option in message({"budget": budget})

    def test_a_profile_is_read_by_allocation_profile_and_for_the_first_round_of_breakpoint(self):
        def reads(**budget):
            return from_mapping({"budget": budget}).budget.reads_profile

        assert reads(allocation="profile") and reads(allocation="profile", profile="p.yaml")
        assert reads(allocation="breakpoint", profile="p.yaml") and not reads(allocation="breakpoint")
        assert not reads() and not reads(profile="p.yaml")
        assert "budget.profile: got none" in message({"budget": {"allocation": "profile", "profile": "none"}})

    def test_the_request_limit_is_four_budgets_unless_given_and_never_below_the_budget(self):
        assert EvictionConfig().max_request_budget == 4096
        assert from_mapping({"requests": {"max_budget": 1024}}).max_request_budget == 1024
        assert "requests.max_budget: got 1023" in message({"requests": {"max_budget": 1023}})

    def test_a_configuration_is_immutable_hashable_and_survives_pickling(self):
        config = from_mapping({"budget": LIST_BUDGET})
        with pytest.raises(ValidationError):
            config.policy = "h2o"
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.built_policy.half_life = 3.0
        assert pickle.loads(pickle.dumps(config)) == config
        assert hash(config) == hash(from_mapping({"budget": LIST_BUDGET}))

    def test_every_option_is_described(self):
        sections = [field.annotation for field in EvictionConfig.model_fields.values()]
        for model in (EvictionConfig, *sections, *map(policy_class, policy_names())):
            for name, field in getattr(model, "__pydantic_fields__", {}).items():
                assert field.description, name

    def test_the_package_needs_neither_torch_nor_sglang(self):
        code = (
            "import sys; from lethe_sglang.config import from_mapping; from lethe_sglang.policies import policy_names;"
            "[from_mapping({'policy': name}) for name in policy_names()];"
            "print([m for m in ('torch', 'sglang', 'numpy') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestMessages:
    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            ({"budget": {"tokens": 1}}, "budget.tokens: got 1, expected an integer >= 2"),
            ({"budget": {"tokens": True}}, "budget.tokens: got true, expected an integer >= 2"),
            ({"budget": {"tokens": "64"}}, 'budget.tokens: got "64", expected an integer >= 2'),
            ({"budget": {"tokens": None}}, "budget.tokens: got null, expected an integer >= 2"),
            ({"budget": {**LIST_BUDGET, "layers": [40, -2]}}, "budget.layers[1]: got -2, expected an integer >= 2"),
            (
                {"budget": {**LIST_BUDGET, "layers": []}},
                "budget.layers: got [], expected a list of one or more integers >= 2 (or null)",
            ),
            ({"budget": None}, "budget: got null, expected a mapping with keys among tokens, allocation"),
            ({"rounds": {"interval": 0}}, "rounds.interval: got 0, expected an integer >= 1"),
            ({"retain": {"sinks": -1}}, "retain.sinks: got -1, expected an integer >= 0"),
            ({"retain": {"recent_ratio": 1.0}}, "retain.recent_ratio: got 1.0, expected a number > 0 and < 1"),
            ({"retain": {"prompt": "kept"}}, 'retain.prompt: got "kept", expected one of keep, evict'),
            ({"lethe": {"half_life": 0}}, "lethe.half_life: got 0, expected a number > 0"),
            ({"lethe": {"half_life": math.inf}}, "lethe.half_life: got Infinity, expected a number > 0"),
            ({"lethe": {"score_every": True}}, "lethe.score_every: got true, expected an integer >= 1"),
            ({"policy": "gkv", "gkv": {"alpha": "1"}}, 'gkv.alpha: got "1", expected a number >= 0 and <= 1'),
            (
                {"policy": "morphkv", "morphkv": {"fusion": "avg"}},
                'morphkv.fusion: got "avg", expected one of sum, ma',
            ),
            (
                {"policy": "snapkv", "snapkv": {"kernel": 4}},
                "snapkv.kernel: got 4, which has no middle; use an odd n",
            ),
            ({"lethe": None}, "lethe: got null, expected a mapping with keys among half_life, score_every, key_share"),
            ({"policy": "h2o", "h2o": 3}, "h2o: got 3, expected nothing, it has no options"),
            ({"policy": 3}, "policy: got 3, expected a non-empty string"),
            ({"policy": "none"}, "unknown policy 'none'; legal: lethe, h2o, tova"),
            (
                {"policy": "h2o", "snapkv": {"window": 3}},
                "snapkv: is the section of another policy, this configuration uses h2o; "
                "leave it out or write policy: snapkv",
            ),
            ({"requests": {"allow_off": 1}}, "requests.allow_off: got 1, expected true or false"),
            ({"policy": ""}, 'policy: got "", expected a non-empty string'),
            (
                {"budget": {"allocation": "profil"}},
                'budget.allocation: got "profil", expected one of uniform, profile, list, breakpoint',
            ),
        ],
    )
    def test_a_wrong_value_is_named_with_its_path_and_the_legal_range(self, data, expected):
        assert message(data).startswith(expected)

    def test_a_list_is_not_called_empty_because_of_a_wrong_item(self):
        budget = {"allocation": "list", "layers": [-1], "tokens": 2}
        assert message({"budget": budget}) == "budget.layers[0]: got -1, expected an integer >= 2"

    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            ({"budget": {"token": 5}}, "budget.token: unknown key; did you mean budget.tokens?"),
            ({"retain": {"Recent-Ratio": 2}}, "retain.Recent-Ratio: unknown key; did you mean retain.recent_ratio?"),
            ({"bugdet": {}}, "bugdet: unknown key; did you mean budget?"),
            ({"budget": {"interval": 5}}, "budget.interval: unknown key; rounds.interval belongs in section rounds"),
            ({"budget": {"intervals": 5}}, "budget.intervals: unknown key; did you mean rounds.interval?"),
            ({"sinks": 4}, "sinks: unknown key; retain.sinks belongs in section retain"),
            ({"lethe": {"policy": "h2o"}}, "lethe.policy: unknown key; policy belongs at the top level"),
            ({"lethe": {"interval": 5}}, "lethe.interval: unknown key; rounds.interval belongs in section rounds"),
            ({"lethe": {"halflife": 5}}, "lethe.halflife: unknown key; did you mean lethe.half_life?"),
            ({"half_life": 5}, "half_life: unknown key; lethe.half_life belongs in section lethe"),
            ({"leth": {}}, "leth: unknown key; did you mean lethe?"),
            ({"policy": "h2o", "h2o": {"half_life": 5}}, "h2o.half_life: unknown key; h2o knows no options"),
            (
                {"lethe.half_life": 5},
                "lethe.half_life: unknown key; options are nested, write lethe: {half_life: ...}",
            ),
            ({"policy": "snapkv", "snapkv": {7: 5}}, "snapkv.7: unknown key; snapkv knows window, kernel"),
            ({"budget.tokens": 5}, "budget.tokens: unknown key; options are nested, write budget: {tokens: ...}"),
            ({"rounds": {"xyz": 5}}, "rounds.xyz: unknown key; rounds knows when, interval"),
            ({"rounds": {7: 5}}, "rounds.7: unknown key; rounds knows when, interval"),
        ],
    )
    def test_an_unknown_key_is_answered_with_the_key_that_was_meant(self, data, expected):
        assert message(data) == expected

    @pytest.mark.parametrize("key", ["weights", "alpha", "min_factor", "max_factor", "classes"])
    def test_what_belongs_to_the_allocator_or_the_profile_is_no_option(self, key):
        assert message({"budget": {key: None}}).startswith(f"budget.{key}: ")

    def test_all_problems_are_reported_at_once(self):
        text = message({"budget": {"tokens": 1, "profil": 2}, "retain": {"sinks": -1}})
        assert all(option in text for option in ("budget.tokens", "budget.profil", "retain.sinks"))
        text = message({"lethe": {"half_life": 0, "diversit": 1}, "budget": {"tokens": 1}, "h2o": {}})
        assert all(o in text for o in ("lethe.half_life", "lethe.diversit", "budget.tokens", "h2o: is the section"))
        text = message({"budget": {"tokens": 6}, "requests": {"max_budget": 5}})
        assert all(option in text for option in ("budget.tokens", "requests.max_budget"))

    @settings(deadline=None)
    @given(st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=3), max_size=3))
    def test_anything_at_all_gives_a_configuration_or_one_line(self, data):
        try:
            from_mapping(data)
        except ConfigError as error:
            assert str(error) and len(str(error).splitlines()) == 1


class TestReplaced:
    """An old key is answered with what replaced it, a key that is known is not."""

    @pytest.mark.parametrize("key", [key for key in REPLACED if "=" not in key])
    def test_every_replaced_key_that_is_unknown_says_what_to_write(self, key):
        section, _, name = key.partition(".")
        data = {section: {name: 1} if name else {}}
        if section in policy_names():
            data["policy"] = section
        if name in KNOWN.get(section, ()) or (not name and section in KNOWN):
            assert REPLACED[key] not in str(error_of(data)), "the table was asked about a key that there is"
        else:
            assert message(data) == f"{key}: {REPLACED[key]}"

    @pytest.mark.parametrize("entry", [entry for entry in REPLACED if "=" in entry])
    def test_every_replaced_value_that_is_illegal_says_what_to_write(self, entry):
        key, _, value = entry.partition("=")
        section, _, name = key.partition(".")
        kind = EvictionConfig.model_fields[section].annotation.model_fields[name].annotation
        data = {section: {name: value}}
        if value in get_args(kind):
            assert REPLACED[entry] not in str(error_of(data)), "the table was asked about a value that is legal"
        else:
            assert message(data) == f'{key}: got "{value}", {REPLACED[entry]}'

    def test_the_table_is_asked_about_illegal_values_only(self, monkeypatch):
        monkeypatch.setitem(REPLACED, "lethe.score_every=0", "write 1")
        monkeypatch.setitem(REPLACED, "lethe.score_every=1", "write 2")
        monkeypatch.setitem(REPLACED, "lethe.half_life", "write something else")
        assert message({"lethe": {"score_every": 0}}) == "lethe.score_every: got 0, write 1"
        from_mapping({"lethe": {"score_every": 1, "half_life": 3}})

    def test_each_key_of_an_old_section_has_a_line_of_its_own(self):
        assert message({"rasr": {"half_life": 7, "credit": 1, "score": 2}}) == (
            f"rasr.half_life: {REPLACED['rasr.half_life']}; rasr.credit: {REPLACED['rasr.credit']}"
        )
        assert message({"rasr": {"score": 2}}) == message({"rasr": None}) == f"rasr: {REPLACED['rasr']}"


class TestLoading:
    def test_without_a_source_the_defaults_hold_and_flags_beat_them(self):
        assert resolve() == EvictionConfig()
        config = resolve("h2o", None, 512)
        assert (config.policy, config.budget.tokens) == ("h2o", 512)

    @pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ""])
    def test_flags_beat_the_file_and_leave_the_rest_of_it(self, tmp_path, suffix):
        path = tmp_path / f"mine{suffix}"
        path.write_text(json.dumps({"policy": "tova", "budget": {"tokens": 256, "profile": "none"}}))
        assert resolve(None, str(path), None).policy == "tova"
        config = resolve("h2o", str(path), 512)
        assert (config.policy, config.budget) == ("h2o", BudgetConfig(tokens=512, profile="none"))

    def test_a_flag_that_changes_the_policy_of_a_file_leaves_its_section_out(self):
        assert resolve("h2o", "cpu-demo").built_policy == policy_class("h2o")()
        assert resolve("lethe", "cpu-demo").built_policy == policy_class("lethe")(half_life=7)
        with pytest.raises(ConfigError, match=r"--kv-evict tova: snapkv: is the section of another policy"):
            resolve("tova", '{"policy": "h2o", "snapkv": {"window": 3}}')

    def test_inline_json_is_read(self):
        assert resolve(None, ' {"rounds": {"interval": 16}}').rounds.interval == 16

    @pytest.mark.parametrize("name", sorted(presets()))
    def test_every_preset_loads_as_it_stands(self, name):
        config = resolve(None, name)
        assert config.scored > config.retain.sinks
        assert resolve(None, str(presets()[name])) == config

    def test_the_presets_are_the_five_that_are_promised(self):
        assert set(presets()) == {"cpu-demo", "default", "long-reasoning", "paper", "small-budget"}
        paper = resolve(None, "paper")
        assert paper.budget.allocation == "breakpoint" and not paper.built_policy.uses_keys
        assert paper.built_policy.accumulation.decay == pytest.approx(0.998, abs=2e-6)
        assert resolve(None, "cpu-demo").scored == 33

    def test_the_default_preset_is_the_schema_and_shows_every_option(self):
        assert resolve(None, "default") == EvictionConfig()
        written = yaml.safe_load(presets()["default"].read_text())
        assert {name: set(keys) for name, keys in written.items() if name != "policy"} | {"": set(written)} == (
            {name: set(keys) for name, keys in known_keys(EvictionConfig, lethe=policy_class("lethe")).items()}
        )

    def test_an_installed_wheel_reads_the_presets_inside_the_package(self, tmp_path, monkeypatch):
        shutil.copy(presets()["cpu-demo"], tmp_path / "cpu-demo.yaml")
        monkeypatch.setattr(loading_module, "_PRESET_FOLDERS", (tmp_path, *loading_module._PRESET_FOLDERS))
        assert presets() == {"cpu-demo": tmp_path / "cpu-demo.yaml"}

    def test_a_preset_wins_over_a_file_of_its_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "cpu-demo").write_text("policy: tova")
        assert resolve(None, "cpu-demo").policy == "lethe"
        assert resolve(None, "./cpu-demo").policy == "tova"

    @pytest.mark.parametrize(
        ("name", "text", "expected"),
        [
            ("a.yaml", "budget: {tokens: 5\nrounds:", "not YAML at line 2, column"),
            ("a.yaml", "policy: a\npolicy: b", 'not YAML at line 2, column 1: key "policy" is given twice'),
            ("a.yaml", "? [1, 2]\n: 3", "not YAML at line 1, column 3"),
            ("a.yaml", "policy: \x00", "not YAML"),
            ("a.yaml", "policy: 2026-13-45", "holds a value that cannot be read"),
            ("a.yaml", "# nothing but a comment", "holds nothing, expected a mapping"),
            ("a.yaml", "- policy", 'holds ["policy"], expected a mapping'),
            ("a.json", "{\n 'policy': 1}", "not JSON at line 2, column 2"),
            ("a.json", '{"policy": "a", "policy": "b"}', 'key "policy" is given twice'),
            ("a.json", "[" * 100_000, "nested too deeply"),
            ("a.yaml", "budget: {tokens: 5}", "budget.tokens: got 5"),
        ],
    )
    def test_a_bad_file_is_refused_with_its_name_and_the_place(self, tmp_path, name, text, expected):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError) as caught:
            resolve(None, str(tmp_path / name))
        assert str(caught.value).startswith(f"--kv-evict-config {tmp_path / name}: {expected}")
        assert "\n" not in str(caught.value)

    def test_a_missing_file_is_answered_with_the_presets(self):
        with pytest.raises(ConfigError, match=r"no such file.*presets: cpu-demo, default"):
            resolve(None, "long-resoning")

    def test_what_is_no_readable_text_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            resolve(None, str(tmp_path))
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match="cannot be read"):
            resolve(None, str(tmp_path / "binary.yaml"))

    def test_a_budget_flag_cannot_change_a_list_of_budgets(self):
        with pytest.raises(ConfigError, match=r"--kv-evict-budget 64: .*budget.layers"):
            resolve(None, json.dumps({"budget": LIST_BUDGET}), 64)

    def test_a_budget_flag_that_is_too_small_is_named_in_the_message(self):
        with pytest.raises(ConfigError, match=r"--kv-evict-budget 5: budget.tokens: got 5.*smallest legal value is 8 "):
            resolve(None, None, 5)
        with pytest.raises(ConfigError, match="--kv-evict-budget 5: budget: got 3, expected a mapping"):
            resolve(None, '{"budget": 3}', 5)


class TestOverrides:
    @pytest.mark.parametrize(
        "custom_params",
        [None, {}, {"other": 1}, {"kv_evict": None}, {"kv_evict": {}}, {"kv_evict": {"mode": None, "budget": None}}],
    )
    def test_what_a_request_leaves_out_is_the_server_default(self, custom_params):
        assert parse_request(custom_params, EvictionConfig(), 32768) == RequestOverride(mode="on", budget=1024)

    def test_a_request_may_choose_mode_and_budget(self):
        config = EvictionConfig()
        assert parse_request({"kv_evict": "none"}, config).mode == "none"
        assert parse_request({"kv_evict": {"mode": "none"}}, config).mode == "none"
        assert parse_request({"kv_evict": "on"}, config) == RequestOverride(mode="on", budget=1024)
        assert parse_request({"kv_evict": {"budget": 2048}}, config) == RequestOverride(mode="on", budget=2048)
        assert parse_request({"kv_evict": {"mode": "on", "budget": 400}, "x": []}, config).budget == 400

    def test_the_bounds_of_a_budget_are_legal_and_what_lies_beyond_is_not(self):
        config = EvictionConfig()
        assert config.min_request_budget == config.recent + config.retain.sinks + 1 == 313
        for budget in (313, 4096):
            assert parse_request({"kv_evict": {"budget": budget}}, config).budget == budget
        for budget in (312, 4097, 0, -1):
            text = request_message({"budget": budget}, config)
            assert text == (f"custom_params.kv_evict.budget: got {budget}, expected an integer from 313 to 4096 tokens")

    def test_no_request_asks_for_more_than_the_context_but_the_server_budget_stays_legal(self):
        assert "from 313 to 2000 tokens" in request_message({"budget": 2001}, context_length=2000)
        assert "from 313 to 1024 tokens" in request_message({"budget": 1025}, context_length=512)
        assert parse_request({"kv_evict": {"budget": 1024}}, EvictionConfig(), 512).budget == 1024

    @pytest.mark.parametrize(
        ("asked", "expected"),
        [
            ({"budget": "64"}, 'custom_params.kv_evict.budget: got "64"'),
            ({"budget": True}, "custom_params.kv_evict.budget: got true"),
            ({"budget": 512.0}, "custom_params.kv_evict.budget: got 512.0"),
            ({"mode": "off"}, 'custom_params.kv_evict.mode: got "off", expected "on" or "none"'),
            ("off", 'custom_params.kv_evict.mode: got "off", expected "on" or "none"'),
            ({"mode": []}, "custom_params.kv_evict.mode: got []"),
            (
                {"budgets": 64},
                "custom_params.kv_evict.budgets: unknown key; did you mean custom_params.kv_evict.budget?",
            ),
            (2048, "custom_params.kv_evict: got 2048, expected"),
            ({"mode": "none", "budget": 512}, 'custom_params.kv_evict.budget: got 512 together with mode "none"'),
        ],
    )
    def test_a_bad_override_is_named_with_its_path(self, asked, expected):
        assert request_message(asked).startswith(expected)

    def test_custom_params_that_are_no_mapping_are_refused(self):
        with pytest.raises(ConfigError, match="custom_params: got"):
            parse_request([1], EvictionConfig())  # type: ignore[arg-type]

    def test_a_server_may_forbid_mode_none(self):
        config = from_mapping({"requests": {"allow_off": False}})
        assert "requests.allow_off" in request_message("none", config)
        assert parse_request({"kv_evict": "on"}, config).mode == "on"


def test_packing_at_fixed_lengths_does_not_go_with_rounds_on_demand():
    assert not from_mapping({"debug": {"pack_always": True}}).rounds.by_pressure
    with pytest.raises(ConfigError, match=r"debug\.pack_always: packs at fixed lengths"):
        from_mapping({"rounds": {"when": "pressure"}, "debug": {"pack_always": True}})
    with pytest.raises(ConfigError, match=r"rounds\.when: got \"never\", expected .*always.*pressure"):
        from_mapping({"rounds": {"when": "never"}})
