"""The main job, as the README starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from conftest import ROOT

from lethe_bench.servers import some_free_port


def test_quickstart_answers_right_with_half_the_memory(tmp_path):
    out = tmp_path / "out.json"
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh", "--once", "--json", str(out), "--port", str(some_free_port())],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "LETHE_VENV": sys.prefix},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(out.read_text())
    assert set(report) == {"answer_correct", "rounds", "blocks_held_peak", "blocks_stock_peak", "sglang"}
    assert report["answer_correct"] is True and report["rounds"] >= 4 and report["sglang"] == "0.5.23"
    assert report["blocks_held_peak"] <= 0.5 * report["blocks_stock_peak"]
