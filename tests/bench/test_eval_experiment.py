import json
import re
import sys
from pathlib import Path

import pytest

from lethe_bench.accuracy.experiment import FULL
from lethe_bench.accuracy.loading import differences, load, parse
from lethe_sglang.config import ConfigError, from_mapping
from lethe_sglang.config.changes import reconfigured
from lethe_sglang.policies import policy_class

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "eval").glob("*.yaml"))
DATA = {
    "name": "small",
    "model_path": "models/reasoner",
    "tasks": [{"family": "chain", "problems": 4}, {"family": "walk", "problems": 2}],
    "base": {"retain": {"sinks": 2}, "lethe": {"half_life": 7}},
    "grid": {
        "policies": ["lethe", "random"],
        "budgets": [{"tokens": 96, "interval": 24}, {"tokens": 48, "interval": 12}],
    },
}


def experiment(**changes):
    return parse({**DATA, **changes}, "small.yaml")


# -- the files that ship -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_experiment_that_ships_loads_and_its_arms_run(path):
    found = load(path)
    arms = found.every_arm()
    assert found.name == path.stem and arms[0].name == FULL
    assert {arm.config.policy for arm in arms[1:]} >= {"lethe", "random"}
    for arm in arms[1:]:
        assert isinstance(arm.config.built_policy, policy_class(arm.config.policy))
    from_mapping(found.server_config())


def test_the_main_experiment_is_the_table_that_was_asked_for():
    found = load(next(path for path in CONFIGS if path.stem == "reasoner"))
    assert len(found.every_arm()) == 1 + 11 * 3 + 3  # lethe as in the paper at each budget
    assert sum(task.problems for task in found.tasks) == 500
    assert {task.tokens for task in found.tasks} == {(200, 400)}
    items = {task: len(made) for task, made in found.items().items()}
    assert items == dict.fromkeys(("chain", "walk", "addition", "script", "recall"), 100)


# -- arms --------------------------------------------------------------------------------------------------------------


def test_a_grid_gives_every_policy_at_every_budget_over_the_base():
    arms = experiment().every_arm()
    assert [arm.name for arm in arms] == ["full", "lethe@96", "random@96", "lethe@48", "random@48"]
    assert [arm.index for arm in arms] == [None, 0, 1, 2, 3]
    last = arms[-1].config
    assert (last.policy, last.budget.tokens, last.rounds.interval) == ("random", 48, 12)
    assert (last.retain.sinks, arms[-2].config.built_policy.half_life) == (2, 7)


def test_explicit_arms_are_laid_over_the_base_section_by_section():
    arms = [{"name": "forgetful", "config": {"retain": {"recent_ratio": 0.5}}}, {"name": "as-is"}]
    found = experiment(arms=arms, grid=None, full=False).every_arm()
    assert [(arm.name, arm.index) for arm in found] == [("forgetful", 0), ("as-is", 1)]
    assert (found[0].config.retain.sinks, found[0].config.retain.recent_ratio) == (2, 0.5)
    assert found[1].config.retain.recent_ratio == 0.3


def test_the_server_can_be_switched_to_every_arm():
    small = experiment()
    whole = from_mapping(small.server_config())
    assert whole.pool.states == "all" and not whole.debug.record_kept
    for arm in small.every_arm()[1:]:
        whole = reconfigured(whole, arm.config.model_dump(mode="json", exclude={"debug", "pool"}))
        assert whole.model_dump(exclude={"debug", "pool"}) == arm.config.model_dump(exclude={"debug", "pool"})


def test_a_server_records_what_was_kept_where_something_is_traced():
    assert from_mapping(experiment(trace=1).server_config()).debug.record_kept


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, r"tasks: got \[\], expected a list of one or more mappings$"),
        ({"tasks": [{"famly": "chain"}]}, r"tasks\[0\].famly: unknown key; did you mean tasks\[0\].family\?"),
        ({"tasks": [{"family": "chains", "problems": 1}]}, r'"chains" \(did you mean "chain"\?\); legal: chain, '),
        ({"tasks": [{"family": "chain"}]}, r"tasks\[0\]: problems: required with family; give an integer >= 1$"),
        ({"tasks": [{"dataset": "aime"}]}, r"tasks\[0\]: path: required with dataset"),
        ({"tasks": [{"problems": 1}]}, r"tasks\[0\]: give either family or dataset"),
        ({"tasks": [{"family": "chain", "problems": 1, "path": "x"}]}, "path: only with dataset; leave it out"),
        ({"tasks": [{"family": "chain", "problems": 1, "tokens": [9, 3]}]}, r"tokens: got \[9, 3\], expected \["),
        ({"tasks": [{"family": "chain", "problems": 1}] * 2}, 'tasks: "chain" is there twice'),
        ({"tasks": [{"dataset": "aime", "path": "x"}]}, r"tasks\[0\].max_new_tokens: a dataset has no reference reply"),
        ({"sampling": {"max_new_tokens": "2y"}}, 'sampling.max_new_tokens: got "2y", expected an integer >= 1 or a f'),
        ({"sampling": {"max_new_tokens": True}}, "sampling.max_new_tokens: got true, expected an integer >= 1"),
        ({"sampling": {"samples": 4}}, "sampling: samples: got 4 with temperature 0"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p: got 0, expected a number > 0 and <= 1$"),
        ({"server": {"pagesize": 1}}, r"server.pagesize: unknown key; did you mean server.page_size\?"),
        ({"server": {"extra": ["--page-size=8"]}}, "'--page-size=8' is set by lethe eval; use server.page_size"),
        ({"server": {"extra": "--tp 2"}}, 'server.extra: got "--tp 2", expected a list of strings$'),
        ({"base": {"retan": {}}}, r"arm lethe@96: retan: unknown key; did you mean retain\?"),
        ({"base": {"debug": {"arms": []}}}, "arm lethe@96: debug.arms: not an option; POST /kv_evict gives"),
        ({"grid": {"policies": ["lethe"], "budgets": [{"tokens": 4, "interval": 1}]}}, "lethe@4: budget.tokens: got 4"),
        ({"grid": {"policies": ["lethe"], "budgets": [{"tokens": 9}]}}, r"\[0\].interval: required; give an integer"),
        ({"arms": [{"name": "lethe@48"}]}, 'arms: "lethe@48" is there twice'),
        ({"arms": [{"name": "a", "config": {"rasr": {"decay": 0.9}}}]}, "arm a: rasr.decay: write lethe.half_life"),
        ({"arms": [{"name": "full"}]}, 'arms: "full" is there twice'),
        ({"arms": [{"name": "a/b"}]}, 'name: got "a/b", expected letters'),
        ({"grid": None, "full": False}, "arms: nothing to run; set full to true"),
        ({"concurrency": 0}, "concurrency: got 0, expected an integer from 1 to 512$"),
        ({"nam": "x"}, r"nam: unknown key; did you mean name\?"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key_and_a_legal_value(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        experiment(**changes)
    assert str(caught.value).startswith("small.yaml: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "holds "),
        ("", "holds null, expected a mapping"),
        ("name: [", "not YAML"),
        ("name: a\nname: b", "given twice"),
    ],
)
def test_a_file_that_holds_no_experiment_is_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="No such file or directory; give the path"):
        load(tmp_path / "nowhere.yaml")


# -- growing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tasks": [{"family": "chain", "problems": 9}, DATA["tasks"][1], {"family": "script", "problems": 1}]},
        {"arms": [{"name": "lethe-slow@48", "config": {"budget": {"tokens": 48}, "lethe": {"half_life": 90}}}]},
        {"trace": 2},
    ],
)
def test_an_experiment_may_grow(changes):
    assert differences(experiment(), experiment(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": DATA["tasks"][:1]}, "tasks: walk is gone"),
        ({"tasks": [{"family": "chain", "problems": 3}, DATA["tasks"][1]]}, "chain has fewer problems .* use --limit"),
        (
            {"tasks": [{"family": "chain", "problems": 4, "tokens": [200, 300]}, DATA["tasks"][1]]},
            r"tokens of chain was \[200, 560\], is \[200, 300\]",
        ),
        ({"sampling": {"max_new_tokens": 100}}, "max_new_tokens of chain was 2x, is 100"),
        ({"sampling": {"temperature": 0.6}}, "sampling: was .*0.0.* is .*0.6"),
        ({"grid": {**DATA["grid"], "policies": ["lethe"]}}, "arms: random@96 is gone; .* use --only"),
        (
            {"grid": {**DATA["grid"], "budgets": [{"tokens": 96, "interval": 23}, DATA["grid"]["budgets"][1]]}},
            "arms: lethe@96 is configured differently",
        ),
        ({"full": False}, "arms: full is gone"),
        ({"base": {}}, "base: was .*, is {}"),
        ({"split": "tune"}, 'split: was "test", is "tune"'),
        ({"model_path": "models/other"}, 'model_path: was "models/reasoner", is "models/other"'),
        ({"server": {"page_size": 8}}, "server: was"),
    ],
)
def test_a_change_that_would_mix_results_is_named(changes, message):
    found = differences(experiment(), experiment(**changes))
    assert re.search(message, "; ".join(found))


def test_an_experiment_survives_being_written_down():
    small = experiment(trace=1, arms=[{"name": "a", "config": {"lethe": {"half_life": 90}}}])
    assert parse(json.loads(small.model_dump_json()), "config.yaml") == small


# -- servers -----------------------------------------------------------------------------------------------------------


def test_the_servers_differ_in_the_eviction_flags_alone():
    small = experiment(server={"max_total_tokens": 4096, "page_size": 8, "extra": ["--tp", "2"]})
    stock, evicting = small.server_command(31000, None), small.server_command(31000, Path("/private/server.yaml"))
    assert evicting[: len(stock)] == stock and not any("kv-evict" in word for word in stock)
    assert evicting[len(stock) :] == ["--kv-evict", "lethe", "--kv-evict-config", "/private/server.yaml"]
    assert stock[-2:] == ["--tp", "2"] and "--max-running-requests" not in stock
    shown = small.readable(evicting)
    assert shown[0] == "python" and sys.prefix not in " ".join(shown) and "/private" not in " ".join(shown)
