"""A policy of another distribution, built and installed from its own project, serves on a real server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from conftest import MODEL, ROOT, WARM, config
from problems import WALKS

PROJECT = ROOT / "examples" / "own_policy"
EVERY, SINKS, BUDGET = 3, 4, 48
SETTINGS = dict(
    budget={"tokens": BUDGET},
    rounds={"interval": 16},
    retain={"sinks": SINKS},
    debug={"shadow": True, "record_kept": True},
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build the project into a wheel and install it; returns an environment that finds it."""
    folder = tmp_path_factory.mktemp("outside")
    shutil.copytree(PROJECT, folder / "project")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, *alone, "--target", str(folder / "site"), str(folder / "project")], check=True)
    return {"PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])}


def test_it_serves_with_its_option_and_keeps_what_it_ranks_first(installed, start):
    server = start(
        "--max-total-tokens",
        "4096",
        "--page-size",
        "1",
        "--kv-evict",
        "stride",
        "--kv-evict-config",
        config(**SETTINGS, stride={"every": EVERY}),
        env=installed,
    ).wait()
    server.generate(WALKS[0], tokens=160, ignore_eos=True)
    report = server.lethe()
    assert report["policy"] == "stride" and report["shadow"]["checks"] > 0
    rounds = [entry for entry in report["kept"] if entry["rid"] == report["last_finished"]["rid"]]
    assert len(rounds) >= 4 and min(report["last_finished"]["evicted_per_layer"]) > 40
    before, start_of_new = [], rounds[0]["prefix"]
    for entry in rounds:
        for kept in entry["kept"]:
            seen = [*before, *range(start_of_new, entry["tail"])]
            ranked = sorted(seen, key=lambda p: (p < SINKS, p % EVERY == 0, p), reverse=True)
            assert kept == sorted(ranked[: len(kept)]), "not what the policy ranks first"
            assert len(kept) < len(ranked)
        before, start_of_new = entry["kept"][0], entry["tail"]
        assert all(kept == before for kept in entry["kept"])  # it looks at positions only, so layers agree
    server.check_healthy()
    server.stop()


def test_its_option_is_validated_before_a_server_starts(installed):
    arguments = ["--kv-evict", "stride", "--kv-evict-config", config(stride={"every": 0, "evry": 2})]
    done = WARM.run(["-m", "sglang.launch_server", "--model-path", MODEL, *arguments], **installed)
    assert done.returncode == 2
    assert "stride.every: got 0, expected an integer >= 1" in done.stderr
    assert "stride.evry: unknown key; did you mean stride.every?" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_lethe_show_know_it(installed):
    def output(*command: str) -> str:
        done = WARM.run(["-m", *command], **installed)
        assert done.returncode == 0, done.stderr
        return done.stdout

    lethe = ("lethe_sglang.cli.main", "show")
    assert "\nstride:\n  every: 2\n" in output(*lethe, "--kv-evict", "stride")
    assert "| `stride.every` | `2` | Distance of the positions that are kept. Tokens, >= 1. |" in (
        output(*lethe, "--policies")
    )
    assert "stride" not in output(*lethe, "--options"), "the page of the documentation is the same everywhere"
    assert "random, stride. Default" in " ".join(output("sglang.launch_server", "--help").split())
