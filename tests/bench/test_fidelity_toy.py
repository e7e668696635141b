"""The command that the guide names for any model, on one that is at hand, with fewer and shorter documents."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from lethe_sglang.cli import main as program
from lethe_sglang.policies import policy_names

ROOT = Path(__file__).parents[2]


def test_every_policy_is_measured_on_a_model_of_ones_own(tmp_path, capsys):
    asked = yaml.safe_load((ROOT / "configs" / "fidelity" / "policies.yaml").read_text())
    asked |= {"tokens": 480, "corpora": {"own": 1, "prose": 1, "recall": 1}}
    asked["base"] |= {"budget": {"tokens": 60}, "rounds": {"interval": 32}}
    (tmp_path / "policies.yaml").write_text(yaml.safe_dump(asked))
    out = tmp_path / "out"
    command = ["eval", "fidelity", str(tmp_path / "policies.yaml"), "--model", str(ROOT / "models" / "reasoner-dev")]
    short = (tmp_path / "policies.yaml").read_text().replace("tokens: 480", "tokens: 360")
    (tmp_path / "short.yaml").write_text(short)
    assert program.main(["eval", "fidelity", str(tmp_path / "short.yaml"), *command[3:], "--in-process", "1"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].endswith("tokens: got 360, too few for recall; the smallest legal value is 459")
    assert not any("sampling" in line for line in said), "what cannot work is refused before anything is written"
    assert program.main([*command, "--out", str(out), "--in-process", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "fidelity.md")
    arms = json.loads((out / "fidelity.json").read_text())["arms"]
    assert {*policy_names()} <= {*arms} and all(arm["kl"]["mean"] > 0 for arm in arms.values())
    assert all(arm["corpora"]["recall"]["documents"] == 1 and "recall" in arm for arm in arms.values())
    page = (out / "fidelity.md").read_text()
    assert all(f"| {arm} | 1 |" in page for arm in arms) and "## Paired" in page
