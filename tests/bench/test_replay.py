"""Forced replies without a server: attention over what is kept, scores of many steps at once, rounds of the product."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from profiles import MODEL, profile
from test_fidelity import Letters, small_gguf

from lethe_bench import models
from lethe_bench.fidelity import plots, replay
from lethe_bench.fidelity.corpora import Document
from lethe_bench.fidelity.inprocess import InProcess, forced
from lethe_bench.fidelity.network import Network
from lethe_bench.fidelity.replay import Replay, full
from lethe_sglang.allocation.budgets import from_config
from lethe_sglang.allocation.profile import load, save
from lethe_sglang.cli import main as program
from lethe_sglang.config import ConfigError, from_mapping
from lethe_sglang.files import Journal

TOKENS = torch.randint(1, 40, (60,), generator=torch.Generator().manual_seed(3)).tolist()
PROMPT, REPLY = TOKENS[:10], TOKENS[10:]
BASE = {"budget": {"tokens": 12}, "rounds": {"interval": 5}, "retain": {"sinks": 2}}
POLICIES = {
    "lethe": {"lethe": {"half_life": 20.0}},
    "every third": {"lethe": {"score_every": 3}},
    "morphkv": {"policy": "morphkv", "morphkv": {"window": 4, "fusion": "max"}},
    "snapkv": {"policy": "snapkv", "snapkv": {"window": 3, "kernel": 3}},
    "tova": {"policy": "tova"},
    "lazy": {"policy": "lazy", "lazy": {"threshold": 0.05}},
    "gkv": {"policy": "gkv"},
    "keydiff": {"policy": "keydiff"},
    "random": {"policy": "random"},
    "list": {"budget": {"allocation": "list", "layers": [9, 15]}},
    "breakpoint": {"budget": {"allocation": "breakpoint"}},
}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = small_gguf(path / "small.gguf")
    with torch.no_grad():
        for weights in model.parameters():  # attention that is sharp, so that what is kept matters
            weights.mul_(6.0 if weights.dim() == 2 else 1.0)
    model.save_pretrained(path)
    return Network(path)


def config_of(change):
    merged = {name: {**BASE.get(name, {}), **change.get(name, {})} for name in BASE}
    if "layers" in merged["budget"]:
        del merged["budget"]["tokens"]
    return from_mapping({**change, **merged})


def made(network, change, known=60):
    document = full(network, PROMPT, REPLY, known)
    config = config_of(change)
    return Replay(network, config, from_config(config, network.layers), document)


@torch.inference_mode()
def test_the_full_cache_is_what_the_model_says(network):
    document = full(network, PROMPT, REPLY, 25)
    network.model.set_attn_implementation("eager")
    expected = network.model(torch.tensor([TOKENS]), output_attentions=True, output_hidden_states=True)
    network.model.set_attn_implementation("lethe_replay")
    torch.testing.assert_close(document.logits, expected.logits[0, 9:59].log_softmax(-1), rtol=1e-4, atol=1e-5)
    seen = torch.stack([layer[0, :, :25, :25].mean(0) for layer in expected.attentions])
    torch.testing.assert_close(document.attention, seen, rtol=1e-4, atol=1e-6)
    assert document.keys.shape == (2, 25, 2, 8)


@torch.inference_mode()
def test_the_full_cache_is_attended_in_strips(network, monkeypatch):
    whole = full(network, PROMPT, REPLY, 40)
    monkeypatch.setattr(replay, "STRIP", 7)
    for one, other in zip(full(network, PROMPT, REPLY, 40)[2:], whole[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
@torch.inference_mode()
def test_steps_at_once_are_steps_one_by_one(network, name, monkeypatch):
    at_once = made(network, POLICIES[name])
    together = at_once.run()
    assert len(at_once.rounds) >= 4
    one_by_one = made(network, POLICIES[name])
    chunk, take = Replay._chunk, Replay._take

    def steps(self, start, end):
        for at in range(start, end):
            yield from chunk(self, at, at + 1)

    monkeypatch.setattr(Replay, "_chunk", steps)
    monkeypatch.setattr(Replay, "_take", lambda self, start, end: [take(self, at, at + 1) for at in range(start, end)])
    torch.testing.assert_close(one_by_one.run(), together, rtol=1e-3, atol=1e-4)
    assert one_by_one.rounds == at_once.rounds and one_by_one.state.kept == at_once.state.kept
    for one, other in zip(one_by_one._lists(55), at_once._lists(55), strict=True):
        assert one.tolist() == other.tolist()


@torch.inference_mode()
def test_what_an_arm_attends_to_is_what_it_kept(network):
    """Streaming keeps by position alone: one mask over the whole document says the same."""
    arm = made(network, {"policy": "streaming"})
    found = arm.run()
    config, mask, kept, rounds = arm.config, torch.ones((59, 59)).tril().bool(), set(range(10, 59)), [*arm.rounds]
    for position in range(59):
        if position in rounds:
            own = sorted(p for p in kept if p < position - config.recent)
            kept -= set(own[: -config.scored])
        mask[position] &= torch.tensor([p < 10 or p in kept for p in range(59)])
    network.model.set_attn_implementation("eager")
    bias = torch.zeros((1, 1, 59, 59)).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = network.model(torch.tensor([TOKENS[:59]]), attention_mask=bias).logits[0].log_softmax(-1)
    network.model.set_attn_implementation("lethe_replay")
    torch.testing.assert_close(found, expected[59 - len(found) :], rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_what_was_not_computed_before_is_computed_and_says_the_same(network):
    short, long = made(network, {}, known=12), made(network, {})
    assert short.document.keys.shape[1] == 12
    torch.testing.assert_close(short.run(), long.run(), rtol=1e-3, atol=1e-4)


def test_steps_before_the_first_round_are_the_full_cache_s(network):
    [(name, steps, rounds)] = forced(network, Document("prose-1", PROMPT, REPLY), {"lethe": config_of({})})
    assert name == "lethe" and steps.shape == (50, 4) and steps.dtype == np.float32
    changed = np.flatnonzero(np.abs(steps[:, 0]) > 1e-5)
    with torch.inference_mode():
        first = made(network, {})
        first.run()
    assert rounds == [length - 9 for length in first.rounds]
    assert changed[0] == rounds[0] and steps[changed, 0].max() > 1e-3
    assert (steps[: changed[0], 1] == 1).all() and (steps[: changed[0], 2] == steps[: changed[0], 3]).all()


def test_arms_side_by_side_are_arms_by_themselves(network):
    """Other first rounds, other lengths between rounds: what the model sees at once is of many kinds."""
    changes = {**POLICIES, "late": {"budget": {"tokens": 30}}, "never": {"budget": {"tokens": 200}}}
    document, arms = Document("prose-1", PROMPT, REPLY), {name: config_of(change) for name, change in changes.items()}
    for name, steps, rounds in forced(network, document, arms):
        [(_, alone, at)] = forced(network, document, {name: arms[name]})
        np.testing.assert_allclose(steps, alone, rtol=1e-3, atol=1e-4, err_msg=name)
        assert rounds == at and bool(rounds) == (name != "never")


def test_a_private_prompt_is_refused(network):
    with pytest.raises(ConfigError, match=r"retain.prompt: got evict.*set it to keep"):
        next(forced(network, Document("prose-1", PROMPT, REPLY), {"a": from_mapping({"retain": {"prompt": "evict"}})}))


@pytest.mark.parametrize("extra", ["sliding_window", "softcap", "s_aux"])
def test_attention_that_is_not_computed_here_is_refused(network, extra, monkeypatch):
    attention = network.model.base_model.layers[1].self_attn
    before = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: before(*args, **{**kwargs, extra: 3}))
    with pytest.raises(ConfigError, match=f"--in-process: layer 1 uses {extra}; measure on a server"):
        full(network, PROMPT, REPLY, 25)


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_curves_average_over_documents_by_position_and_by_steps_since_a_round():
    steps = [np.array([0.0, 0.0, 1.0, 3.0, 1.0, 3.0]), np.array([0.0, 0.0, 0.0, 3.0, 5.0, 7.0])]
    x, y = plots.by_position(steps, bins=3)
    assert x.tolist() == [1, 3, 5] and y.tolist() == [0.0, 1.75, 4.0]
    x, y = plots.by_distance(steps, [[2, 4], [3]])
    assert x.tolist() == [0, 1] and y.tolist() == pytest.approx([(1 + 1 + 3) / 3, (3 + 3 + 5) / 3])


# -- the command ------------------------------------------------------------------------------------------------------

FILE = """
name: small
tokens: 64
corpora: {own: 2}
base: {budget: {tokens: 12}, rounds: {interval: 5}, retain: {sinks: 2}}
arms:
  lethe: {}
  random: {policy: random}
"""


class Few(Letters):
    """Letters as tokens of the small model."""

    def encode(self, text, add_special_tokens=True):
        return [1 + ord(letter) % 39 for letter in text]


def test_a_run_without_a_server_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small_gguf(tmp_path / "small.gguf")
    model = models.directory(str(tmp_path / "small.gguf"), print)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: Few())
    (tmp_path / "small.yaml").write_text(FILE)
    out = tmp_path / "out"
    command = ["eval", "fidelity", str(tmp_path / "small.yaml"), "--model", str(model), "--out", str(out)]
    assert program.main([*command, "--in-process", "1"]) == 0
    assert str(out / "fidelity.md") in capsys.readouterr().out
    made = {path.relative_to(out): np.load(path) for path in sorted(out.glob("*/*.npy"))}
    assert len(made) == 4 and not list(out.glob("*/*.draft"))
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [len(sample["reply"]) for sample in samples] == [64, 64] and samples[0]["reply"] != samples[1]["reply"]
    lost = next(iter(made))
    (out / lost).unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.npy")}
    assert program.main([*command, "--in-process", "2"]) == 0
    np.testing.assert_allclose(np.load(out / lost), made[lost], atol=1e-5)  # it was one of two arms, and is alone
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


@pytest.mark.parametrize(
    ("arm", "says"),
    [
        ("{retain: {prompt: evict}}", "retain.prompt: got evict, which is measured on a server only"),
        (
            "{budget: {allocation: list, layers: [12, 12, 12]}}",
            "budget.layers: got 3 values, but the model has 2",
        ),
    ],
)
def test_an_arm_that_cannot_be_replayed_is_refused_before_anything_is_done(tmp_path, capsys, network, arm, says):
    (tmp_path / "small.yaml").write_text(
        FILE.replace("lethe: {}", f"lethe: {arm}").replace("tokens: 12}", "tokens: 12}")
    )
    command = ["eval", "fidelity", str(tmp_path / "small.yaml"), "--model", network.model.config._name_or_path]
    assert program.main([*command, "--out", str(tmp_path / "out"), "--in-process", "1"]) == 2
    assert says in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


def test_what_a_layer_costs_alone_becomes_the_rule_of_a_profile(tmp_path, monkeypatch, capsys, network):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: Few())
    two = profile(MODEL.model_copy(update={"layers": 2}))
    save(two, tmp_path / "old.yaml")
    (tmp_path / "small.yaml").write_text(FILE)
    asked = {}

    class Pretended(InProcess):
        def all(self):
            asked.update(self.experiment.configs())
            Journal(self.out / "experiment.json").add([{"corpora": {"own": 1, "recall": 1}, "tokens": 64}])
            for name, values in (("own-1", []), ("recall-1", [[60, 62, "stated"]])):
                Journal(self.out / "documents.jsonl").add([{"name": name, "values": values}])
                for layer in range(2):
                    (self.out / f"layer-{layer}").mkdir(exist_ok=True)
                    steps = np.zeros((64, 4), dtype=np.float32)
                    steps[12:, 0], steps[60:62, 2] = 0.1 + 0.3 * layer, 0.5 - 0.25 * layer
                    np.save(self.out / f"layer-{layer}" / f"{name}.npy", steps)

    monkeypatch.setattr("lethe_bench.fidelity.inprocess.InProcess", Pretended)
    options = ["--profile", str(tmp_path / "old.yaml"), "--new", str(tmp_path / "new.yaml"), "--in-process", "1"]
    places = ["--model", network.model.config._name_or_path, "--out", str(tmp_path / "out")]
    assert program.main(["eval", "layers", str(tmp_path / "small.yaml"), *options, *places]) == 0
    assert [asked[f"layer-{n}"].budget.layers for n in range(2)] == [(12, 576), (576, 12)]
    assert {config.recent for config in asked.values()} == {4}, "the window of the experiment"
    new = load(tmp_path / "new.yaml")
    assert new.rule == "fidelity" and new.fidelity.kl == pytest.approx((0.1, 0.4))
    assert new.fidelity.recall == pytest.approx((0.5, 0.25))
    assert (new.fidelity.kept, new.fidelity.tokens, new.fidelity.documents) == (12, 64, 2)
    assert new.model_copy(update={"rule": two.rule, "fidelity": None, "budgets": two.budgets}) == two
    said = capsys.readouterr().out
    assert "budget by fidelity; kl, recall: 2 forced replies, one layer pruned to 12" in said


def test_layers_are_pruned_from_one_budget(tmp_path, capsys):
    save(profile(), tmp_path / "old.yaml")
    (tmp_path / "small.yaml").write_text(FILE.replace("lethe: {}", "lethe: {budget: {allocation: breakpoint}}"))
    options = ["--profile", str(tmp_path / "old.yaml"), "--new", str(tmp_path / "new.yaml")]
    assert program.main(["eval", "layers", str(tmp_path / "small.yaml"), *options]) == 2
    assert "budget.allocation: got breakpoint, but the layers are pruned one at a time" in capsys.readouterr().err
