import json
import sys
from types import ModuleType

import pytest
import yaml

from lethe_sglang.cli import main as cli
from lethe_sglang.config import EvictionConfig, from_mapping, presets, resolve


def test_show_prints_the_defaults_with_their_derived_values(capsys):
    assert cli.main(["show"]) == 0
    printed = capsys.readouterr().out
    assert from_mapping(yaml.safe_load(printed)) == EvictionConfig()
    comments = [line for line in printed.splitlines() if line.startswith("#")]
    assert any(line.startswith("# R = 308 ") for line in comments)
    assert any(line.startswith("# K = 716 ") for line in comments)
    assert any(line.startswith("# gamma = 0.994599 ") for line in comments)
    assert "# a request may ask for 313 to 4096 tokens" in comments


def test_flags_beat_the_configuration_they_go_with(capsys):
    assert cli.main(["show", "--kv-evict", "h2o", "--kv-evict-config", "cpu-demo", "--kv-evict-budget", "64"]) == 0
    printed = capsys.readouterr().out
    assert from_mapping(yaml.safe_load(printed)) == resolve("h2o", "cpu-demo", 64)
    assert "# R = 20 " in printed


@pytest.mark.parametrize(
    "source",
    [
        *presets(),
        json.dumps({"budget": {"allocation": "list", "layers": [900 + layer for layer in range(40)]}}),
        json.dumps({"budget": {"allocation": "profile", "profile": "1e3"}, "retain": {"recent_ratio": 0.1 + 1 / 7}}),
        json.dumps({"budget": {"allocation": "list", "layers": [40, 50, 61]}, "lethe": {"half_life": 1e5}}),
        json.dumps({"budget": {"profile": "yes"}}),
        json.dumps({"policy": "random", "rounds": {"interval": 3}}),
        json.dumps({"policy": "morphkv", "morphkv": {"fusion": "max"}}),
    ],
)
def test_what_is_printed_loads_to_the_same_configuration(source, tmp_path, capsys):
    assert cli.main(["show", "--kv-evict-config", source]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert resolve(None, str(tmp_path / "printed.yaml")) == resolve(None, source)


def test_a_list_of_numbers_stays_on_its_line(capsys):
    layers = [1000 + layer for layer in range(80)]
    source = json.dumps({"budget": {"allocation": "list", "layers": layers}})
    assert cli.main(["show", "--kv-evict-config", source]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  layers:"))
    assert yaml.safe_load(line) == {"layers": layers}


def test_presets_are_listed_with_what_they_are_for(capsys):
    assert cli.main(["show", "--presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(presets())
    assert all(len(line.split()) > 5 for line in lines)


def test_the_support_matrix_comes_from_the_engine(capsys, monkeypatch):
    support = ModuleType("lethe_sglang.engine.support")
    support.support_matrix = lambda: "| feature | supported |"
    monkeypatch.setitem(sys.modules, "lethe_sglang.engine.support", support)
    assert cli.main(["show", "--support"]) == 0
    assert capsys.readouterr().out == "| feature | supported |\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--kv-evict-config", "nope"], "--kv-evict-config nope: no such file"),
        (["--kv-evict-budget", "5"], "--kv-evict-budget 5: budget.tokens: got 5"),
        (["--kv-evict", "none"], "--kv-evict none: SGLang runs unpatched"),
        (["--presets", "--kv-evict", "h2o"], "--presets: takes no --kv-evict option"),
        (["--support", "--kv-evict-budget", "64"], "--support: takes no --kv-evict option"),
    ],
)
def test_a_bad_request_is_one_line_on_stderr_and_status_2(arguments, expected, capsys):
    assert cli.main(["show", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"lethe show: error: {expected}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["shwo"], ["show", "--preset"], ["show", "--presets", "--support"]])
def test_a_wrong_command_line_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: lethe" in capsys.readouterr().err
