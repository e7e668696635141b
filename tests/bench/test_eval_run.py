import http.server
import json
import re
import socket
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import yaml

from lethe_bench.accuracy import live, prompts
from lethe_bench.accuracy import run as eval_run
from lethe_bench.accuracy.datasets import DATASETS
from lethe_bench.accuracy.loading import parse
from lethe_bench.accuracy.prompts import Prompts
from lethe_bench.accuracy.run import Run
from lethe_bench.accuracy.store import Store
from lethe_bench.servers import Server, ServerError
from lethe_sglang.cli import main as program
from lethe_sglang.config import ConfigError, from_mapping
from lethe_sglang.config.changes import reconfigured
from lethe_sglang.files import read_lines

DATA = {
    "name": "small",
    "model_path": "models/none",
    "tasks": [{"family": "chain", "problems": 3}, {"family": "walk", "problems": 2}],
    "grid": {"policies": ["lethe", "random"], "budgets": [{"tokens": 48, "interval": 12}]},
    "concurrency": 3,
}
ARMS = ("full", "lethe@48", "random@48")


class Fake(Server):
    """A server that knows the answers: SGLang's endpoints as the evaluation uses them, in a thread.

    ``random`` answers every second problem wrongly. What is asked is kept in ``log_of``; ``odd`` changes behaviour.
    """

    log_of: ClassVar[list[tuple[str, str, dict]]] = []
    odd: ClassVar[dict] = {}
    answers: ClassVar[dict[str, str]] = {}

    def __enter__(self):
        source = dict(zip(self.command, self.command[1:], strict=False)).get("--kv-evict-config")
        self.config = from_mapping(yaml.safe_load(Path(source).read_text())) if source else None
        self.finished, self.kept, self.lock = deque(maxlen=1024), deque(maxlen=256), threading.Lock()
        self.log.write_text("Some line\nlast line of the log\n")
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests = self.path == "/kv_evict/requests"
                self.answer({}, fake.requests if requests else fake.info)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                routes = {"/generate": fake.generate, "/flush_cache": lambda body: {}, "/kv_evict": fake.reconfigure}
                self.answer(body, routes[self.path.partition("?")[0]])

            def answer(self, body, route):
                with fake.lock:
                    Fake.log_of.append(("lethe" if fake.config else "stock", self.path.partition("?")[0], body))
                    status, reply = 200, route(body)
                if isinstance(reply, tuple):
                    status, reply = reply
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(reply).encode())

            def log_message(self, *args):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def stop(self):
        self._http.shutdown()
        self._http.server_close()

    def info(self, body):
        state = {}
        if self.config is not None:
            now = self.config
            shape = {"policy": now.policy, "budget_tokens": now.budget.tokens, "interval": now.rounds.interval}
            state = {"lethe": {**shape, "kept": list(self.kept), **self.odd.get("state", {})}}
        return {"device": "cpu", "page_size": 1, "internal_states": [state]}

    def requests(self, body):
        return {"requests": [{**r, "number": i} for i, r in enumerate(self.finished)], "newest": len(self.finished)}

    def reconfigure(self, body):
        if self.odd.get("refuse"):
            return 400, {"error": {"message": "kv_evict: 1 requests are running"}}
        self.config = reconfigured(self.config, body)
        return {"changed": {}}

    def generate(self, body):
        if "status" in self.odd:
            return self.odd["status"], {"error": "too long"}
        question = "".join(map(chr, body["input_ids"]))
        text, finish = Fake.answers[question], {"type": "stop"}
        if self.config is not None and self.config.policy == "random" and len(question) % 2:
            text = text[:-1] + "?"
        limit = body["sampling_params"]["max_new_tokens"]
        if len(text) > limit:
            text, finish = text[:limit], {"type": "length"}
        steps, rid = len(text) - 1, body["rid"]
        if self.config is not None and not self.odd.get("forget"):
            record = {
                "rid": rid,
                "rounds": 3,
                "evicted_per_layer": [10, 20],
                "steps": steps,
                "own_held_mean": 40.0,
                "own_stock_mean": steps / 2,
                "held_peak": 60,
                "stock_peak": steps,
            }
            self.finished.extend([record] * self.odd.get("records", 1))
            if self.config.debug.record_kept:
                entry = {"rid": rid, "round": 0, "prefix": 10, "tail": 40, "kept": [[10, 12], [11]]}
                self.kept.extend([entry, {**entry, "rid": "another"}, {**entry, "round": 1, "tail": 52}])
        ended = "<eos>" if finish["type"] == "stop" else ""
        finish = self.odd.get("finish", finish)
        meta = {"finish_reason": finish, "prompt_tokens": len(question), "completion_tokens": len(text)}
        return {"text": text + ended, "meta_info": {**meta, "e2e_latency": 0.5}}


class FakePrompts:
    """One character is one token, but for the one that ends a reply."""

    end = "<eos>"

    def __init__(self, *args):
        pass

    def encode(self, question):
        return list(map(ord, question))

    def length(self, text):
        return len(text)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """Put the fake in place of SGLang, with what it does remembered, and nothing slow."""
    Fake.log_of, Fake.odd, Fake.answers = [], {}, {}
    monkeypatch.setattr(eval_run, "Server", Fake)
    monkeypatch.setattr(prompts, "Prompts", FakePrompts)
    monkeypatch.setattr(live, "PATIENCE", 2)
    return Fake


def a_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(directory, only=(), servers=1, **changes):
    experiment = parse({**DATA, **changes}, "small.yaml")
    items = experiment.items()
    Fake.answers |= {item.prompt: item.reference for found in items.values() for item in found}
    store = Store(directory)
    with store.locked():
        store.begin(experiment, "lethe eval run small.yaml")
        Run(
            experiment=experiment,
            store=store,
            prompts=FakePrompts(),
            items=items,
            only=only,
            port=a_port(),
            servers=servers,
            say=lambda line: None,
        ).all()
    return store


def asked(path="/generate", kind=None):
    return [body for where, what, body in Fake.log_of if what == path and kind in (None, where)]


# -- a whole run -------------------------------------------------------------------------------------------------------


def test_every_arm_answers_every_problem_once_and_what_it_held_is_joined(tmp_path):
    store = run(tmp_path)
    for arm in ARMS:
        lines = read_lines(store.generations(arm))
        assert sorted(line["id"] for line in lines) == ["chain/0", "chain/1", "chain/2", "walk/0", "walk/1"]
        for line in lines:
            assert line["output"].rpartition("</think>")[2].startswith(line["answer"][:-1])
            assert line["tokens"] == len(line["output"]) - len("<eos>") and line["finish"] == "stop"
            assert line["rid"].endswith(f"/{line['id']}/0")
            held = (line["tokens"] - 1) / 2 if arm == "full" else 40.0
            assert line["memory"]["own_held_mean"] == held and line["memory"]["steps"] == line["tokens"] - 1
            assert line["memory"]["evicted_per_layer"] == ([] if arm == "full" else [10, 20])
            assert line["ok"] == (arm != "random@48" or len(line["question"]) % 2 == 0)
    assert len({body["rid"] for body in asked()}) == len(asked()) == 15


def test_stock_answers_for_full_and_one_server_is_switched_through_the_other_arms(tmp_path):
    run(tmp_path)
    assert len(asked(kind="stock")) == 5 and len(asked(kind="lethe")) == 10
    assert [(body["policy"], body["budget"]["tokens"]) for body in asked("/kv_evict")] == [
        ("lethe", 48),
        ("random", 48),
    ]
    assert not any({"debug", "pool"} & set(body) for body in asked("/kv_evict")), "settled at the start"
    paths = [what for where, what, _ in Fake.log_of if where == "lethe"]
    assert paths.index("/flush_cache") < paths.index("/kv_evict") < paths.index("/generate")
    notes = Store(tmp_path).config()["runs"][-1]
    assert list(notes["servers"]) == ["stock", "lethe"] and notes["servers"]["stock"]["device"] == "cpu"
    assert {"command", "machine", "versions", "verifier"} <= set(notes)


def test_servers_side_by_side_share_the_arms_out(tmp_path, monkeypatch):
    together, ask = threading.Barrier(2), Run._ask

    def meet(self, server, job, prompt):
        if job.item.id == "chain/0":  # both servers are at work, or this test does not end well
            together.wait(10)
        return ask(self, server, job, prompt)

    monkeypatch.setattr(Run, "_ask", meet)
    store = run(tmp_path, servers=3, full=False, trace=1)
    assert sorted(body["policy"] for body in asked("/kv_evict")) == ["lethe", "lethe", "random", "random"]
    for arm in ARMS[1:]:
        assert len({line["id"] for line in read_lines(store.generations(arm))}) == 5
    assert sorted(line["arm"] for line in read_lines(store.traces)) == sorted(ARMS[1:])
    assert list(store.config()["runs"][-1]["servers"]) == ["lethe"]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["lethe-1.log", "lethe.log"]


def test_one_failing_server_ends_the_others_and_says_why(tmp_path, monkeypatch):
    failed, ask = threading.Event(), Run._ask

    def fail(self, server, job, prompt):
        if server.port == self.port and job.item.id == "chain/0":
            failed.set()
            raise ServerError("the cause")
        assert failed.wait(10)
        time.sleep(0.2)
        return ask(self, server, job, prompt)

    monkeypatch.setattr(Run, "_ask", fail)
    with pytest.raises(ServerError, match="the cause"):
        run(tmp_path, servers=2, full=False)


def test_greedy_requests_are_bounded_by_the_reference_and_keep_special_tokens(tmp_path):
    run(tmp_path, only=("full",), sampling={"max_new_tokens": "1.5x"})
    for body in asked():
        params = body["sampling_params"]
        reference = Fake.answers["".join(map(chr, body["input_ids"]))]
        assert params["temperature"] == 0 and params["skip_special_tokens"] is False and "sampling_seed" not in params
        assert 0 <= params["max_new_tokens"] - 1.5 * (len(reference) + 1) < 1


def test_a_reply_that_is_cut_off_is_wrong(tmp_path):
    lines = read_lines(run(tmp_path, only=("full",), sampling={"max_new_tokens": 20}).generations("full"))
    assert {(line["finish"], line["tokens"], line["ok"]) for line in lines} == {("length", 20, False)}


def test_sampled_replies_have_seeds_of_their_own_which_are_those_of_every_arm(tmp_path):
    run(tmp_path, sampling={"temperature": 0.6, "top_p": 0.9, "samples": 2, "seed": 3})
    seeds = {}
    for body in asked():
        assert (body["sampling_params"]["temperature"], body["sampling_params"]["top_p"]) == (0.6, 0.9)
        seeds.setdefault(body["rid"].partition("/")[2], set()).add(body["sampling_params"]["sampling_seed"])
    assert len(seeds) == 10 and all(len(found) == 1 for found in seeds.values())
    assert len(set.union(*seeds.values())) == 10


def test_traces_are_taken_from_every_arm_and_hold_their_own_request_only(tmp_path):
    store = run(tmp_path, trace=2)
    assert [body["policy"] for body in asked("/kv_evict")] == ["lethe", "lethe", "random", "random"]
    traces = read_lines(store.traces)
    assert [(line["arm"], line["id"]) for line in traces] == [
        (arm, id) for arm in ("lethe@48", "random@48") for id in ("chain/0", "walk/0")
    ]
    assert [entry["round"] for entry in traces[0]["rounds"]] == [0, 1] and "rid" not in traces[0]["rounds"][0]
    before = len(asked())
    run(tmp_path, trace=2)
    assert len(asked()) == before


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, ServerError])
def test_a_run_that_was_stopped_goes_on_with_what_is_missing(tmp_path, monkeypatch, end):
    append, written = Store.append, []

    def stop_in_the_second_arm(self, path, lines):
        if path.stem == "lethe@48" and path.exists():
            raise end
        written.extend(lines)
        append(self, path, lines)

    monkeypatch.setattr(eval_run, "FETCH_REQUESTS", 1)
    monkeypatch.setattr(Store, "append", stop_in_the_second_arm)
    with pytest.raises(end):
        run(tmp_path, concurrency=1)
    monkeypatch.setattr(Store, "append", append)
    assert 5 < len(written) < 10
    Fake.log_of.clear()
    store = run(tmp_path, concurrency=1)
    assert len(asked()) == 15 - len(written) and not asked(kind="stock")
    for arm in ARMS:
        lines = read_lines(store.generations(arm))
        assert len({line["id"] for line in lines}) == len(lines) == 5
    assert {line["segment"] for line in read_lines(store.generations("lethe@48"))} == {1, 2}


def test_replies_are_written_while_a_slow_one_is_still_running(tmp_path, monkeypatch):
    ask, path = Run._ask, Store(tmp_path).generations("full")

    def slow(self, server, job, prompt):
        deadline = time.monotonic() + 10
        while job.item.id == "chain/1" and len(read_lines(path)) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.monotonic() < deadline
        return ask(self, server, job, prompt)

    monkeypatch.setattr(eval_run, "FETCH_SECONDS", 0.05)
    monkeypatch.setattr(Run, "_ask", slow)
    assert len(read_lines(run(tmp_path, only=("full",)).generations("full"))) == 5


def test_what_was_answered_before_a_failure_is_kept(tmp_path, monkeypatch):
    ask = Run._ask

    def fail_at_the_end(self, server, job, prompt):
        if job.item.id == "walk/1":
            time.sleep(0.3)
            raise ConnectionResetError
        return ask(self, server, job, prompt)

    monkeypatch.setattr(Run, "_ask", fail_at_the_end)
    with pytest.raises(ServerError, match="the server is gone"):
        run(tmp_path, full=False)
    assert len(read_lines(Store(tmp_path).generations("lethe@48"))) == 4


def test_a_line_that_a_kill_tore_is_asked_again(tmp_path):
    store = run(tmp_path)
    path = store.generations("lethe@48")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert len(read_lines(path)) == 4
    Fake.log_of.clear()
    run(tmp_path)
    assert len(asked()) == 1
    assert len(read_lines(path)) == 5 and path.read_bytes().count(b"\n") == 5


def test_only_the_arms_that_were_named_are_run(tmp_path):
    store = run(tmp_path, only=("random@48",))
    assert not store.generations("full").exists() and not store.generations("lethe@48").exists()
    assert len(read_lines(store.generations("random@48"))) == 5


def test_more_problems_and_arms_are_added_and_nothing_is_asked_twice(tmp_path):
    run(tmp_path)
    Fake.log_of.clear()
    more = {"policies": ["h2o", "lethe", "random"], "budgets": [{"tokens": 48, "interval": 12}]}
    run(tmp_path, grid=more, tasks=[{"family": "chain", "problems": 4}, {"family": "walk", "problems": 2}])
    new = [body["rid"].partition("/")[2] for body in asked()]
    assert new.count("chain/3/0") == 4 and len(new) == 4 + 5
    assert [body["policy"] for body in asked("/kv_evict")] == ["h2o", "lethe", "random"]


def test_another_configuration_in_the_same_directory_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(
        ConfigError, match=r"holds results of another configuration \(split: was \"test\", is \"tune\"\)"
    ):
        run(tmp_path, split="tune")


def test_replies_to_other_questions_are_not_taken_for_these(tmp_path):
    data = tmp_path / "aime.jsonl"
    data.write_text('{"problem": "One?", "answer": "1"}\n')
    task = {"tasks": [{"dataset": "aime", "path": str(data), "max_new_tokens": 9}]}
    Fake.answers = {f"One?{DATASETS['aime'].instruction}": "\\boxed{1}"}
    run(tmp_path / "out", **task)
    data.write_text('{"problem": "Two?", "answer": "2"}\n')
    with pytest.raises(ConfigError, match="full answered another aime/0; the problems have changed"):
        run(tmp_path / "out", **task)


def test_two_runs_do_not_write_into_one_directory(tmp_path):
    with Store(tmp_path).locked(), pytest.raises(ConfigError, match="another run writes there"):
        run(tmp_path)


# -- servers that misbehave --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"refuse": True}, "refused to switch to arm lethe@48: .*1 requests are running"),
        ({"state": {"policy": "h2o"}}, r"switched to .*'policy': 'lethe'.* and reports {'policy': 'h2o'}"),
        ({"state": {"budget_tokens": 49}}, r"reports {'budget_tokens': 49}"),
        ({"forget": True}, r"did not report what \d requests held, \w+/"),
        ({"finish": {"type": "abort", "message": "no room"}}, r"(chain|walk)/\d: the server gave up: no room"),
        ({"status": 400}, r"the server refused http://127.0.0.1:\d+/generate: .*too long"),
    ],
)
def test_a_server_that_does_not_do_as_told_ends_the_run(tmp_path, odd, message):
    Fake.odd = odd
    with pytest.raises(ServerError, match=message):
        run(tmp_path, full=False)
    assert not Store(tmp_path).generations("lethe@48").exists()


def test_a_server_that_dies_ends_the_run_with_its_last_words(tmp_path, monkeypatch):
    def die(self, body):
        raise ConnectionAbortedError

    monkeypatch.setattr(Fake, "generate", die)
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "handle_error", lambda *args: None)
    with pytest.raises(ServerError, match=r"the server is gone \((.|\n)*last line of the log"):
        run(tmp_path)


def test_a_stock_server_that_evicts_and_an_evicting_one_that_does_not_are_refused():
    def server(state):
        return SimpleNamespace(get=lambda path: {"internal_states": [state], "device": "cpu", "other": 1})

    assert live.check_server(server({}), evicts=False) == {"device": "cpu"}
    assert live.check_server(server({"lethe": {"rounds": 1}}), evicts=True) == {"device": "cpu"}
    with pytest.raises(ServerError, match="the stock server evicts"):
        live.check_server(server({"lethe": {}}), evicts=False)
    with pytest.raises(ServerError, match="is the plugin installed"):
        live.check_server(server({}), evicts=True)


def test_a_request_that_was_retracted_has_one_record(tmp_path):
    Fake.odd = {"records": 2}
    line = read_lines(run(tmp_path, only=("lethe@48",)).generations("lethe@48"))[0]
    memory, steps = line["memory"], line["tokens"] - 1
    assert (memory["rounds"], memory["evicted_per_layer"], memory["steps"]) == (6, [20, 40], 2 * steps)
    assert (memory["own_held_mean"], memory["own_stock_mean"], memory["held_peak"]) == (40, steps / 2, 60)


# -- prompts -----------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Adds a first token of its own, as many tokenizers do, unless told not to."""

    eos_token = "<eos>"

    def __init__(self, chat_template):
        self.chat_template = chat_template

    def apply_chat_template(self, messages, add_generation_prompt, tokenize, **variables):
        assert add_generation_prompt and not tokenize
        return f"<{messages[0]['content']}{variables.get('enable_thinking', '')}>"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [2 if c == "<" else ord(c) for c in text]}


@pytest.mark.parametrize(
    ("template", "variables", "ids"),
    [
        ("yes", {}, [2, ord("q"), ord(">")]),
        (None, {}, [1, ord("q")]),
        ("yes", {"enable_thinking": 1}, [2, 113, 49, 62]),
    ],
)
def test_a_prompt_has_the_special_tokens_of_the_template_and_no_others(monkeypatch, template, variables, ids):
    loader = SimpleNamespace(from_pretrained=lambda path, local_files_only: Tokenizer(template))
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoTokenizer=loader))
    made = Prompts("models/some", variables)
    assert made.encode("q") == ids and made.length("abc") == 3 and made.end == "<eos>"


# -- the command -------------------------------------------------------------------------------------------------------


def files(tmp_path, **changes):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({**DATA, "model_path": str(model), **changes}))
    for found in parse({**DATA, **changes}, "small.yaml").items().values():
        Fake.answers |= {item.prompt: item.reference for item in found}
    return file


def test_an_experiment_is_run_and_reported_from_the_command_line(tmp_path, capsys):
    file, out = files(tmp_path), tmp_path / "results"
    options = ["--out", str(out), "--port", str(a_port())]
    assert program.main(["eval", "run", str(file), "--limit", "2", "--only", "full", "lethe@48", *options]) == 0
    assert len(asked()) == 2 * 4
    assert program.main(["eval", "run", str(file), *options]) == 0
    assert len(asked()) == 15
    capsys.readouterr()
    assert program.main(["eval", "report", str(out)]) == 0
    page = capsys.readouterr().out
    assert page == (out / "report.md").read_text()
    assert "\n    lethe eval run small.yaml --only full lethe@48 --limit 2 --out results\n" in page
    assert "| lethe@48 |" in page and str(tmp_path) not in page


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupt(self, *args):
        raise KeyboardInterrupt

    file = files(tmp_path)
    monkeypatch.setattr(eval_run.Run, "_keep", interrupt)
    assert program.main(["eval", "run", str(file), "--out", str(tmp_path / "out"), "--port", str(a_port())]) == 130
    assert "the same command goes on where this one stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, ["--only", "leth@48"], r"--only leth@48: no such arm \(did you mean lethe@48\?\); legal: full, lethe@48,"),
        ({}, ["--model-path", "/nowhere"], "model_path /nowhere: no model there; give a directory with a config.json"),
        (
            {"grid": {**DATA["grid"], "policies": ["leth"]}},
            [],
            r"arm leth@48: unknown policy 'leth' \(did you mean 'lethe'\?\); legal: lethe, h2o",
        ),
        (
            {"tasks": [{"dataset": "aime", "path": "a.jsonl", "max_new_tokens": 9}]},
            ["--data-dir", "/nowhere"],
            "aime: /nowhere/a.jsonl: No such file or directory; give the path of a local file",
        ),
    ],
)
def test_a_mistake_is_found_before_a_server_starts(tmp_path, capsys, changes, options, message):
    file = files(tmp_path)
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))
    assert (
        program.main(["eval", "run", str(file), "--out", str(tmp_path / "out"), "--port", str(a_port()), *options]) == 2
    )
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and not Fake.log_of


def test_a_busy_port_and_a_directory_without_results_are_refused(tmp_path, capsys):
    file = files(tmp_path)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        assert program.main(["eval", "run", str(file), "--port", port]) == 2
    assert f"--port {port}: {port} is in use; give another" in capsys.readouterr().err
    assert program.main(["eval", "report", str(tmp_path)]) == 2
    assert "no results there; give a directory made by lethe eval run" in capsys.readouterr().err
