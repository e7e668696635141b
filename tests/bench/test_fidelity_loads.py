"""Fidelity against load: groups that are forced together, going on after a stop, tables, refusals."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_fidelity import Letters, Served, at

from lethe_bench.fidelity import loads
from lethe_bench.fidelity import run as fidelity_run
from lethe_bench.fidelity.processor import Forced
from lethe_bench.servers import some_free_port
from lethe_sglang.cli import main as program
from lethe_sglang.files import read_lines

FILE = """
name: small
tokens: 64
corpora: {prose: 5}
at_once: 9
pool_tokens: 600
loads: [1, 2, 4]
base: {budget: {tokens: 48}, rounds: {interval: 8}}
arms:
  always: {}
  pressure: {rounds: {when: pressure}}
"""


class Together(Served):
    """Answers no request before as many are there as the load says; under pressure four of them lose something."""

    commands: list = []  # noqa: RUF012
    most_whole = 0

    def __enter__(self):
        super().__enter__()
        Together.commands.append(self.command)
        self.lock, self.barriers, self.whole = contextlib.nullcontext(), {}, 0
        return self

    def generate(self, body):
        folder = re.match(r"(full|\w+@\d+)-", body["rid"])[1]
        Together.asked.append(body["rid"])
        load = 1 if folder == "full" else int(folder.partition("@")[2])
        if folder == "full":
            self.whole += 1
            Together.most_whole = max(Together.most_whole, self.whole)
            time.sleep(0.2)  # until all that come at once are here
        self.barriers.setdefault(load, threading.Barrier(load)).wait(5)
        forced = body["sampling_params"]["custom_params"]["forced"]
        wrong = 0.0 if folder in ("full", "pressure@1", "pressure@2") else 0.5 if folder == "pressure@4" else 1.0
        for step in range(len(forced["tokens"])):
            base = 3 * torch.randn(130, generator=torch.Generator().manual_seed(step))
            noise = wrong * torch.randn(130, generator=torch.Generator().manual_seed(10_000 + step))
            at(forced, step, (base + noise).log_softmax(-1))
        with self.log.open("a") as log:
            print(f"Decode batch, #running-req: {load}, #token: {load * 1000}, token usage: 0.5", file=log)
        if folder == "full":
            self.whole -= 1
        return {"output_ids": forced["tokens"]}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    Together.asked, Together.commands, Together.most_whole = [], [], 0
    monkeypatch.setattr(fidelity_run, "Server", Together)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: Letters())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def command(*more, file=FILE, action="fidelity"):
        (tmp_path / "small.yaml").write_text(file)
        options = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--port", str(some_free_port())]
        return program.main(["eval", action, str(tmp_path / "small.yaml"), *options, *more])

    return command


def test_the_first_documents_fill_up_the_last_group():
    assert loads.groups("abcde", 2) == [["a", "b"], ["c", "d"], ["e", "a"]]
    assert loads.groups("abcde", 4) == [list("abcd"), list("eabc")]
    assert loads.groups("ab", 1) == [["a"], ["b"]] and loads.groups("ab", 2) == [["a", "b"]]


@pytest.mark.parametrize("seen", [2, 3])
def test_a_retracted_request_goes_on_at_the_first_token_that_it_does_not_have(tmp_path, seen):
    tokens, logits = [3, 1, 4], [torch.randn(1, 7, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    np.save(tmp_path / "full.npy", torch.cat(logits).log_softmax(-1).numpy())
    forced = {"tokens": tokens, "reference": str(tmp_path / "full.npy"), "result": str(tmp_path / "arm.npy")}
    params = {"forced": forced, "__req__": SimpleNamespace(retraction_count=0, output_ids=[])}
    said = [int(Forced()(logits[step].clone(), [params]).argmax()) for step in range(seen)]
    params["__req__"] = SimpleNamespace(retraction_count=1, output_ids=said[: seen - 1])  # the last was in flight
    said[seen - 1 :] = [int(Forced()(logits[step].clone(), [params]).argmax()) for step in range(seen - 1, 3)]
    assert said == tokens
    found = np.load(tmp_path / "arm.npy")
    assert found.shape == (3, 4) and np.abs(found[:, 0]).max() < 1e-3, "each step is compared with its own"


def test_a_group_is_forced_together_and_again_as_a_whole(fake, tmp_path, capsys):
    assert fake() == 0
    command = dict(zip(Together.commands[0], Together.commands[0][1:], strict=False))
    assert (command["--max-running-requests"], command["--max-total-tokens"]) == ("9", "600")
    assert command["--decode-log-interval"] == "1"
    longest = 64 + max(document["prompt"] for document in read_lines(tmp_path / "out" / "documents.jsonl"))
    assert 1 < Together.most_whole <= 600 // longest < 5, "of the full cache as many at once as the pool holds whole"
    assert len(Together.asked) == 5 + 2 * (5 + 3 * 2 + 2 * 4)

    text = (tmp_path / "out" / "fidelity.md").read_text()
    assert str(tmp_path / "out" / "fidelity.md") in capsys.readouterr().out
    assert "](load.svg)" in text and (tmp_path / "out" / "load.svg").read_text().startswith("<?xml")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| --- " not in line]
    by_load = {(row[0], row[1]): row for row in rows if len(row) == 7 and row[0].isdigit()}
    assert set(by_load) == {(str(load), arm) for load in (1, 2, 4) for arm in ("always", "pressure")}
    kl = {key: float(row[2].split()[0]) for key, row in by_load.items()}
    assert kl["1", "pressure"] == kl["2", "pressure"] < 1e-3 < kl["4", "pressure"] < kl["4", "always"]
    assert kl["1", "always"] == kl["2", "always"] == kl["4", "always"]
    assert by_load["4", "always"][4:] == ["4.0", "4000", "0"]
    paired = text.partition("4 at once:")[2].partition("\n\n\n")[0]
    assert "less always" in paired and "| pressure | -" in paired

    lost = sorted((tmp_path / "out" / "pressure@2").glob("*.npy"))[2]
    lost.unlink()
    Together.asked.clear()
    assert fake() == 0
    assert len(Together.asked) == 2 and f"pressure@2-{lost.stem}" in Together.asked and lost.exists()
    Together.asked.clear()
    assert fake(file=FILE.replace("[1, 2, 4]", "[1, 2, 4, 5]")) == 0, "a load more"
    assert len(Together.asked) == 2 * 5
    assert len(read_lines(tmp_path / "out" / "loads.jsonl")) == 2 * (5 + 3 + 2 + 1) + 1


def test_another_pool_is_another_experiment_and_without_loads_there_is_none(fake, tmp_path, capsys):
    assert fake(file=FILE.replace("[1, 2, 4]", "[1]")) == 0
    assert fake(file=FILE.replace("600", "800")) == 2
    assert "holds results of another experiment (other pool_tokens)" in capsys.readouterr().err
    kept = json.loads((tmp_path / "out" / "experiment.json").read_text())
    assert kept["pool_tokens"] == 600 and "loads" not in kept
    (tmp_path / "plain.yaml").write_text(FILE.replace("pool_tokens: 600\nloads: [1, 2, 4]\n", ""))
    plain = fidelity_run.load(tmp_path / "plain.yaml")
    fidelity_run.Run(experiment=plain, model=tmp_path / "model", out=tmp_path / "plain").check_out()
    assert "pool_tokens" not in json.loads((tmp_path / "plain" / "experiment.json").read_text())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[1, 2, 4]", "[1, 4, 2]"), r"loads: got \[1, 4, 2\]; expected increasing integers >= 1"),
        (("[1, 2, 4]", "[0, 2]"), r"loads: got \[0, 2\]; expected"),
        (("[1, 2, 4]", "[1, 8]"), "loads: got 8, but there are 5 documents; expected"),
        (("pool_tokens: 600\n", ""), "loads: pool_tokens and loads come together; expected"),
        (("loads: [1, 2, 4]\n", ""), "loads: pool_tokens and loads come together; expected"),
        (("600", "570"), r"pool_tokens: got 570; expected an integer >= tokens \+ 512"),
        (("at_once: 9", "trajectories: 3"), r"loads: got \[1, 2, 4\]; .* without trajectories"),
    ],
)
def test_loads_at_fault_are_one_line(fake, capsys, change, says):
    assert fake(file=FILE.replace(*change)) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(says, said) and "\n" not in said


def test_without_a_server_there_is_no_load(fake, capsys):
    assert fake("--in-process", "1") == 2
    assert "loads: they need a server" in capsys.readouterr().err
