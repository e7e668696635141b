"""What a running server may change, and when."""

from __future__ import annotations

import pytest

from lethe_sglang.config import ConfigError, EvictionConfig, from_mapping, parse_request
from lethe_sglang.config.changes import OPTIONS, changes, reconfigured, when

SHARED = ("budget", "rounds", "retain", "requests", "pool", "monitor", "debug")


def options():
    """Every option that is not a policy's own."""
    fields = EvictionConfig.model_fields
    yield from (name for name in fields if not hasattr(fields[name].annotation, "model_fields"))
    for section in SHARED:
        yield from (f"{section}.{name}" for name in fields[section].annotation.model_fields)


@pytest.mark.parametrize("option", options())
def test_every_option_is_in_exactly_one_class(option):
    classes = sum(option in listed for listed in OPTIONS.values())
    assert classes == 1, f"say in config/changes.py when {option} may change"


def test_every_option_of_the_table_exists_and_a_policys_own_change_on_an_idle_server():
    assert {option for listed in OPTIONS.values() for option in listed} == set(options())
    assert when("snapkv.window") == "idle" and when("budget.tokens") == "running" and when("debug.shadow") == "start"


def test_options_are_laid_over_the_running_configuration():
    running = from_mapping({"budget": {"tokens": 100}, "retain": {"sinks": 2}, "rounds": {"interval": 8}})
    new = reconfigured(running, {"budget": {"tokens": 50}})
    assert (new.budget.tokens, new.retain.sinks, new.rounds.interval) == (50, 2, 8)
    assert changes(running, new) == {"budget.tokens": [100, 50]}
    assert changes(running, reconfigured(running, {})) == {}
    assert changes(running, reconfigured(running, running.model_dump(mode="json"))) == {}


def test_a_policys_options_go_with_it():
    running = from_mapping({"policy": "snapkv", "snapkv": {"window": 9}})
    assert reconfigured(running, {"snapkv": {"kernel": 3}}).model_dump()["snapkv"] == {"window": 9, "kernel": 3}
    there = reconfigured(running, {"policy": "morphkv", "morphkv": {"window": 7}})
    back = reconfigured(there, {"policy": "snapkv", "snapkv": {"kernel": 3}})
    assert back.model_dump()["snapkv"]["window"] == 32, "the old policy's window outlived it"
    assert changes(running, there)["policy"] == ["snapkv", "morphkv"]
    assert changes(running, there)["snapkv.window"] == [9, None]


def test_a_list_of_budgets_brings_its_mean_along():
    running = from_mapping({"budget": {"allocation": "list", "layers": [40, 60]}})
    new = reconfigured(running, {"budget": {"layers": [80, 100]}})
    assert changes(running, new) == {"budget.layers": [[40, 60], [80, 100]], "budget.tokens": [50, 90]}
    for also in ({"layers": None}, {}):
        assert reconfigured(running, {"budget": {"allocation": "uniform", **also}}).budget.tokens == 50
    new = reconfigured(running, {"budget": {"allocation": "uniform", "tokens": 80}})
    assert (new.budget.tokens, new.budget.layers) == (80, None)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([], r"kv_evict: got \[\], expected a mapping of options"),
        (None, "kv_evict: got null, expected a mapping"),
        ({"budget": None}, "kv_evict: budget: got null, expected a mapping"),
        ({"bugdet": {}}, "kv_evict: bugdet: unknown key; did you mean budget"),
        ({"budget": {"tokens": 3}}, "kv_evict: budget.tokens: got 3, .* smallest legal value is"),
        ({"rounds": {"interval": "often"}}, 'kv_evict: rounds.interval: got "often", expected an integer >= 1'),
        ({1: 2}, "kv_evict: "),
    ],
)
def test_options_that_cannot_be_used_are_one_line(given, named):
    with pytest.raises(ConfigError, match=named) as error:
        reconfigured(EvictionConfig(), given)
    assert "\n" not in str(error.value)


def test_a_request_keeps_what_it_asked_for_as_far_as_the_new_limits_go():
    config = from_mapping({"budget": {"tokens": 100}})
    smaller = from_mapping({"budget": {"tokens": 50}, "requests": {"max_budget": 90, "allow_off": False}})
    larger = from_mapping({"budget": {"tokens": 1000}})
    usual = parse_request(None, config)
    assert usual.under(smaller).budget == 50, "the server's budget is followed"
    same = parse_request({"kv_evict": {"budget": 100}}, config)
    assert same.under(smaller).budget == 90, "what was asked for is kept, as far as it is legal"
    assert parse_request({"kv_evict": {"budget": 60}}, config).under(smaller).budget == 60
    assert parse_request({"kv_evict": {"budget": 60}}, config).under(larger).budget == larger.min_request_budget == 305
    assert parse_request({"kv_evict": "none"}, config).under(smaller).mode == "none"
