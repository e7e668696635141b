"""Two profiles compared and drawn: ``lethe profiles``."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from profiles import MODEL, profile

from lethe_bench.cli.profiles import rank_correlation
from lethe_sglang.allocation.profile import save
from lethe_sglang.cli import main as cli

HOYER = (0.9, 0.5, 0.7, 0.8)


def test_two_profiles_are_compared_below_their_tables(tmp_path, capsys):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    save(profile(hoyer=HOYER), first)
    save(profile(MODEL.model_copy(update={"dtype": "bfloat16"}), hoyer=(0.5, 0.9, 0.7, 0.6)), second)
    assert cli.main(["profiles", str(first), str(second)]) == 0
    printed = capsys.readouterr().out
    assert "a.yaml: toy" in printed and "b.yaml: toy" in printed
    assert "the same model: no: dtype float32 against bfloat16" in printed
    hoyer = next(line for line in printed.splitlines() if line.strip().startswith("hoyer "))
    assert hoyer.split()[1:] == ["-1.000", "0.400", "(layer", "0)", "40.0"]
    assert cli.main(["profiles", str(first)]) == 0
    assert "the same model" not in capsys.readouterr().out


def test_a_plot_is_drawn(tmp_path, capsys):
    save(profile(hoyer=HOYER), tmp_path / "a.yaml")
    out = tmp_path / "p.png"
    assert cli.main(["profiles", str(tmp_path / "a.yaml"), str(tmp_path / "a.yaml"), "--plot", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
    assert f"drawn to {out}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["nowhere.yaml"], "nowhere.yaml: cannot be read"), (["a.yaml", "--plot", "p.txt"], "--plot p.txt: cannot be w")],
)
def test_a_bad_request_is_one_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(profile(), tmp_path / "a.yaml")
    assert cli.main(["profiles", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lethe profiles: error: {expected}") and error.count("\n") == 1


def test_profiles_of_different_depth_are_not_compared(tmp_path, capsys):
    save(profile(), tmp_path / "a.yaml")
    save(profile(MODEL.model_copy(update={"layers": 2})), tmp_path / "b.yaml")
    assert cli.main(["profiles", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]) == 2
    assert "profiles of 4 and 2 layers" in capsys.readouterr().err


def test_rank_correlation_counts_ties_at_their_mean_rank():
    assert rank_correlation((1, 2, 3, 4), (10, 20, 30, 40)) == pytest.approx(1)
    assert rank_correlation((1, 2, 3, 4), (4, 3, 2, 1)) == pytest.approx(-1)
    assert rank_correlation((1, 2, 2, 3), (1, 2, 3, 4)) == pytest.approx(0.948683, abs=1e-5)
    assert math.isnan(rank_correlation((1, 1), (1, 2)))


def test_comparing_profiles_needs_neither_torch_nor_sglang():
    code = "import sys, lethe_bench.cli.profiles; print([n for n in ('torch', 'sglang') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
