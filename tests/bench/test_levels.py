"""What policies lose at several budgets, read from files of ``lethe eval fidelity``."""

from __future__ import annotations

import json

import pytest

from lethe_bench.fidelity import levels

MEAN = {"low": 0.0, "high": 1.0}


def of(mean):
    return {"mean": mean, **MEAN}


def written(path, tokens, corpora, arms):
    experiment = {"tokens": 800, "base": {"budget": {"tokens": tokens}}, "corpora": dict.fromkeys(corpora, 30)}
    path.write_text(json.dumps({**experiment, "arms": arms}))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """A file from before corpora had numbers of their own, and one whose corpora are more than are asked for."""
    early = {name: {"kl": of(kl), "recall": of(2.0)} for name, kl in (("a", 0.5), ("b", 0.25), ("gone", 0.1))}
    corpora = {"prose": 0.1, "recall": 0.3, "code": 9.0}
    late = {
        name: {
            "kl": of(3.0),
            "recall": of(7.0),
            "corpora": {c: {"kl": of(kl * more), "recall": of(1.5 * more)} for c, kl in corpora.items()},
        }
        for name, more in (("a", 1), ("b", 2))
    }
    first = written(tmp_path / "early.json", 400, ["prose", "recall"], early)
    return first, written(tmp_path / "late.json", 100, list(corpora), late)


def test_means_are_over_the_corpora_that_all_files_have(files, tmp_path, capsys):
    picture = tmp_path / "levels.svg"
    assert levels.main([str(picture), "prose,recall", *files]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| arm | KL at 0.125 | KL at 0.5 | values at 0.125 | values at 0.5 |"
    assert rows == ["| a | 0.200 | 0.500 | 1.500 | 2.000 |", "| b | 0.400 | 0.250 | 3.000 | 2.000 |"]
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize("corpora", ["code,recall", "prose,recall,novels"])
def test_a_file_without_these_corpora_is_one_line(corpora, files, tmp_path, capsys):
    assert levels.main([str(tmp_path / "levels.svg"), corpora, *files]) == 2
    said = capsys.readouterr().err
    assert "early.json: no numbers of" in said and said.count("\n") == 1 and not (tmp_path / "levels.svg").exists()


def test_what_is_no_file_of_numbers_is_one_line(tmp_path, capsys):
    (tmp_path / "other.json").write_text("[1]")
    for name in ("other.json", "nowhere.json"):
        assert levels.main([str(tmp_path / "levels.svg"), "prose", str(tmp_path / name)]) == 2
        assert f"{name}: no numbers of prose there" in capsys.readouterr().err


def test_without_files_the_usage_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        levels.main([str(tmp_path / "levels.svg")])
    assert "usage: python -m lethe_bench.fidelity.levels" in capsys.readouterr().err


def test_without_matplotlib_there_is_the_table_alone(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(levels, "available", lambda: False)
    assert levels.main([str(tmp_path / "levels.svg"), "prose,recall", *files]) == 0
    said = capsys.readouterr()
    assert "| a | 0.200 |" in said.out and said.err.startswith("no picture: matplotlib")
