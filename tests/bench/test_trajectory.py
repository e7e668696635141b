"""Own trajectories: what one prefill says of a reply, how it is asked for, kept and shown."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from test_fidelity import Letters, Served

from lethe_bench.fidelity import run as fidelity_run
from lethe_bench.fidelity.trajectory import AGREEMENT, K3, R, Said, compared, decoded, measured, prefilled, section
from lethe_bench.servers import Server, ServerError, some_free_port
from lethe_sglang.cli import main as program

WORDS = 40
NOISE = {"lethe": 0.2, "random": 1.0}


def full(place: int) -> torch.Tensor:
    """What the full cache says of the token at a place of prompt and reply, float32 ``[WORDS]``."""
    return (2 * torch.randn(WORDS, generator=torch.Generator().manual_seed(place))).log_softmax(-1)


def noisy(place: int, noise: float) -> torch.Tensor:
    wrong = noise * torch.randn(WORDS, generator=torch.Generator().manual_seed(10_000 + place))
    return (full(place) + wrong).log_softmax(-1)


def sglangs(part: str, tokens: list[int], found: list[torch.Tensor | None]) -> dict:
    """An answer as SGLang gives it: lists of log-probability, id and text; None where it has no distribution."""
    steps = [[None if d is None else float(d[t]), t, None] for t, d in zip(tokens, found, strict=True)]
    tops = [None if d is None else [[float(d.max()), int(d.argmax()), None]] for d in found]
    return {"meta_info": {f"{part}_token_logprobs": steps, f"{part}_top_logprobs": tops}}


class Sampling(Served):
    """Samples replies of its own as well, and reads what it is given, as SGLang does."""

    bodies: list[dict] = []  # noqa: RUF012 - emptied for each test
    torn = False

    def generate(self, body):
        sampling = body["sampling_params"]
        if "return_logprob" not in body:
            return super().generate(body)
        Sampling.bodies.append(body)
        given, start = body["input_ids"], body.get("logprob_start_len")
        if start is not None:
            read = given[start:]
            if self.torn:
                read = read[:-1]
            found = [None, *(full(place) for place in range(start + 1, start + len(read)))]
            return sglangs("input", read, found)
        evicts = sampling.get("custom_params") != {"kv_evict": "none"}
        noise = NOISE[self.config.policy] if evicts else 0.0
        places = range(len(given), len(given) + sampling["max_new_tokens"])
        said = [noisy(place, noise) for place in places]
        rng = np.random.default_rng(len(given))
        tokens = [int(rng.choice(WORDS, p=d.double().exp().numpy() / d.double().exp().sum().item())) for d in said]
        return sglangs("output", tokens, said)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    Served.asked, Served.broken, Sampling.bodies, Sampling.torn = [], False, [], False
    monkeypatch.setattr(fidelity_run, "Server", Sampling)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: Letters())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def command(text, *more):
        (tmp_path / "small.yaml").write_text(text)
        options = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--port", str(some_free_port())]
        return program.main(["eval", "fidelity", str(tmp_path / "small.yaml"), *options, *more])

    return command


# -- steps ------------------------------------------------------------------------------------------------------------


def test_a_step_is_the_ratio_of_the_sampled_tokens_probabilities():
    arm = Said([5, 6, 7], [math.log(0.5), math.log(0.2), math.log(0.9)], [5, 1, 7])
    seen = Said([5, 6, 7], [math.log(0.25), math.log(0.4), math.log(0.9)], [4, 1, 7])
    steps = compared(arm, seen)
    assert steps.dtype == np.float32 and steps.shape == (3, 3)
    assert steps[:, R] == pytest.approx([-math.log(2), math.log(2), 0])
    assert steps[:, K3] == pytest.approx([0.5 - 1 + math.log(2), 2 - 1 - math.log(2), 0])
    assert steps[:, AGREEMENT].tolist() == [0, 1, 1]


def test_the_mean_of_k3_over_samples_of_an_arm_is_its_divergence_from_the_full_cache():
    p, q = full(3), noisy(3, 0.7)
    tokens = torch.multinomial(q.exp(), 200_000, True, generator=torch.Generator().manual_seed(0))
    same = [0] * len(tokens)
    steps = compared(Said(same, q[tokens].tolist(), same), Said(same, p[tokens].tolist(), same))
    exact = float((q.exp() * (q - p)).sum())
    spread = float(steps[:, K3].std()) / math.sqrt(len(tokens))
    assert exact > 0.05 and abs(float(steps[:, K3].mean()) - exact) < 4 * spread
    assert abs(float(steps[:, K3].mean()) - float((p.exp() * (p - q)).sum())) > 8 * spread, "not KL(full || arm)"


def test_a_prefill_is_read_from_its_end_where_the_reply_is():
    found = [None, full(1), full(2), full(3)]
    said = prefilled(sglangs("input", [9, 8, 7, 6], found), [7, 6])
    assert said.tokens == [7, 6] and said.logprobs == [float(full(2)[7]), float(full(3)[6])]
    assert said.likeliest == [int(full(2).argmax()), int(full(3).argmax())]


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ({"error": "out of memory"}, "out of memory"),
        ({"meta_info": {}}, "the server gave 0 of 0 log-probabilities of the output"),
        (sglangs("output", [], []), "0 of 0"),
        ({"meta_info": {"output_token_logprobs": [[-0.1, 3, None]]}}, "the output"),
    ],
)
def test_an_answer_without_log_probabilities_is_noticed(reply, says):
    with pytest.raises(ServerError, match=says):
        decoded(reply)


def test_a_prefill_that_lacks_a_step_is_noticed():
    with pytest.raises(ServerError, match="2 of 3 log-probabilities of the input"):
        prefilled(sglangs("input", [8, 7], [full(1), full(2)]), [9, 8, 7])
    with pytest.raises(ServerError, match="of the input"):
        prefilled(sglangs("input", [8, 7], [None, full(2)]), [8, 7])


class Answers:
    """A server that is asked once, and remembers what for."""

    def post(self, path, body, timeout):
        self.asked = path, body
        return json.dumps(sglangs("input", body["input_ids"][1:], [None, full(2), full(3)]))


def test_prompt_and_reply_are_prefilled_once_with_nothing_evicted():
    server = Answers()
    reply = sglangs("output", [11, 12], [noisy(2, 0.5), noisy(3, 0.5)])
    steps = measured(server, [1, 2], reply)
    path, body = server.asked
    assert path == "/generate" and body["input_ids"] == [1, 2, 11, 12] and body["logprob_start_len"] == 1
    assert body["return_logprob"] is True and body["top_logprobs_num"] == 1
    sampling = body["sampling_params"]
    assert sampling["custom_params"] == {"kv_evict": "none"} and sampling["max_new_tokens"] == 1
    expected = [float(full(2)[11] - noisy(2, 0.5)[11]), float(full(3)[12] - noisy(3, 0.5)[12])]
    assert steps[:, R] == pytest.approx(expected, rel=1e-5)


# -- lethe eval fidelity ----------------------------------------------------------------------------------------------

WITHOUT = """
name: small
tokens: 160
corpora: {prose: 1}
at_once: 2
base: {budget: {tokens: 48}, rounds: {interval: 8}}
arms:
  lethe: {}
  random: {policy: random}
"""
WITH = f"trajectories: 3\n{WITHOUT}"


def table(tmp_path) -> dict[str, list[str]]:
    text = (tmp_path / "out" / "fidelity.md").read_text().partition("## Own trajectories")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in rows[2:]}


def test_every_arm_writes_replies_of_its_own_and_the_report_compares_them(fake, tmp_path):
    assert fake(WITH) == 0
    for arm in ("full", "lethe", "random"):
        kept = [np.load(path) for path in sorted((tmp_path / "out" / arm / "trajectories").glob("own-*.npy"))]
        assert len(kept) == 3 and all(steps.shape == (160, 3) for steps in kept)
    rows = table(tmp_path)
    assert list(rows) == ["full", "lethe", "random"]
    means = {arm: float(cells[1].split()[0]) for arm, cells in rows.items()}
    assert means["full"] == 0 and 0.01 < means["lethe"] < means["random"]
    steps = np.concatenate([np.load(p)[48:] for p in (tmp_path / "out" / "lethe" / "trajectories").glob("*.npy")])
    assert means["lethe"] == pytest.approx(float(steps[:, K3].mean()), abs=1e-4)
    assert float(rows["full"][2].split()[0]) == 1 > float(rows["lethe"][2].split()[0])
    assert rows["lethe"][3:] == ["", ""] and rows["random"][3].startswith("+") and rows["random"][4].startswith("-")


def test_trajectories_alone_need_no_documents(fake, tmp_path, capsys):
    assert fake(WITH.replace("corpora: {prose: 1}", "corpora: {}")) == 0
    assert list(table(tmp_path)) == ["full", "lethe", "random"]
    page = (tmp_path / "out" / "fidelity.md").read_text()
    assert "## Paired" not in page and ".svg" not in page
    assert fake(WITHOUT.replace("corpora: {prose: 1}", "corpora: {}")) == 2
    assert "nothing to measure: give corpora some documents, or trajectories a number" in capsys.readouterr().err


def test_steps_before_any_round_are_not_counted(tmp_path):
    steps = np.zeros((20, 3), dtype=np.float32)
    steps[:8, K3], steps[8:, K3] = 5.0, 0.25
    (tmp_path / "lethe" / "trajectories").mkdir(parents=True)
    np.save(tmp_path / "lethe" / "trajectories" / "own-1.npy", steps)
    assert "| lethe | 1 | 0.2500 (" in section(tmp_path, "lethe", ["lethe"], 8)


def test_replies_are_sampled_at_temperature_1_and_only_the_full_caches_keep_everything(fake):
    assert fake(WITH) == 0
    own = [body for body in Sampling.bodies if "logprob_start_len" not in body]
    assert len(own) == 9 and all(body["sampling_params"]["temperature"] == 1 for body in own)
    assert all("logit_bias" not in body["sampling_params"] for body in own)
    kept = [body for body in own if body["sampling_params"].get("custom_params") == {"kv_evict": "none"}]
    assert len(kept) == 3 and len({len(body["input_ids"]) for body in kept}) > 1


def test_trajectories_are_added_to_an_experiment_that_was_done_and_go_on_where_they_stopped(fake, tmp_path, capsys):
    assert fake(WITHOUT) == 0 and not Sampling.bodies
    assert "Own trajectories" not in (tmp_path / "out" / "fidelity.md").read_text()
    Sampling.torn = True
    assert fake(WITH) == 1
    assert "log-probabilities of the input" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("trajectories/*"))
    Sampling.torn = False
    assert fake(WITH) == 0
    lost = next((tmp_path / "out" / "random" / "trajectories").glob("*.npy"))
    lost.unlink()
    Served.asked.clear()
    Sampling.bodies.clear()
    assert fake(WITH) == 0
    assert len(Sampling.bodies) == 2 and not Served.asked and lost.exists()
    Sampling.bodies.clear()
    assert fake(WITH.replace("trajectories: 3", "trajectories: 4"), "--against", "random") == 0
    assert len(Sampling.bodies) == 2 * 3 and table(tmp_path)["lethe"][3].startswith("-")


@pytest.mark.parametrize(
    ("given", "says"),
    [("-1", "trajectories: .*expected an integer >= 0"), ("900", "trajectories: got 900, but there are .. questions")],
)
def test_a_number_of_trajectories_that_cannot_be_is_refused(fake, capsys, given, says):
    import re

    assert fake(WITH.replace("trajectories: 3", f"trajectories: {given}")) == 2
    assert re.search(says, capsys.readouterr().err)


def test_trajectories_are_refused_where_no_server_runs(fake, capsys):
    assert fake(WITH, "--in-process", "1") == 2
    assert "trajectories: they need a server" in capsys.readouterr().err


# -- streams ----------------------------------------------------------------------------------------------------------


def test_the_events_of_a_stream_come_one_by_one(tmp_path):
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()
            for text in asked["texts"]:
                self.wfile.write(f"data: {json.dumps({'text': text})}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        server = Server([], listening.server_address[1], tmp_path / "log")
        events = list(server.stream("/generate", {"texts": ["a", "a data: b"]}))
        listening.shutdown()
    assert events == [{"text": "a"}, {"text": "a data: b"}]
