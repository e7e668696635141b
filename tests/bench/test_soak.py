"""The soak: its schedule, its verdict, what it does to a server (a double), and whether it sees what stays."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import urllib.error
from io import BytesIO
from pathlib import Path

import pytest

from lethe_bench.servers import Server, some_free_port
from lethe_bench.soak import __main__ as program
from lethe_bench.soak import ends, run
from lethe_bench.soak.client import Recorded, Wrong, check, decided, put
from lethe_bench.soak.ends import GONE, ended_under_load, kill, of_session
from lethe_bench.soak.run import Soak, Traffic
from lethe_bench.soak.traffic import CONTROL, QUESTIONS, REQUESTS, SWITCHES, Request, Wave, untouched, waves
from lethe_bench.soak.verdict import Memory, Soaked, alarms, growth, to_json, to_markdown, verdict

# -- schedule ----------------------------------------------------------------------------------------------------------


def first(count, seed=0):
    return list(itertools.islice(waves(seed), count))


def test_a_seed_says_all_of_the_traffic():
    assert first(40) == first(40)
    assert first(40) != first(40, seed=1)


def test_every_kind_and_every_act_comes_soon_and_none_is_forgotten():
    kinds = [request.kind for wave in first(22) for request in wave.requests]
    for start in range(0, len(kinds), len(REQUESTS)):
        assert sorted(kinds[start : start + len(REQUESTS)]) == sorted(REQUESTS)
    acts = [act for wave in first(2) for _, act in wave.control]
    assert acts == list(CONTROL), "two waves hold each act once"
    assert [wave.then for wave in first(4)] == ["pressure", "always"] * 2


def test_names_are_unique_and_only_untouched_requests_are_greedy_without_eviction():
    requests = [request for wave in first(30) for request in wave.requests]
    assert len({request.rid for request in requests}) == len(requests)
    for asked in requests:
        off = asked.body.get("sampling_params", {}).get("custom_params") == {"kv_evict": "none"}
        assert off == (asked.kind == "none")
    assert {r.body["text"] for r in requests if r.kind == "none"} <= {untouched(q, 1)["text"] for q in QUESTIONS}


def test_the_replies_of_one_request_for_several_fill_the_pool_whatever_they_say():
    body = next(request.body for wave in waves(0, Soak.tokens) for request in wave.requests if request.kind == "n")
    assert body["ignore_eos"] and body["n"] * body["max_tokens"] > Soak.pool


# -- verdict -----------------------------------------------------------------------------------------------------------


def well(**changes) -> Soaked:
    memory = [
        Memory(30.0 * i, {"scheduler": 900 + 40 * (i < 20) * i / 20 + i % 2, "detokenizer": 300}) for i in range(60)
    ]
    found = Soaked(seconds=1800, memory=memory, compared=12, effects={"rounds": 400, "requests retracted": 9})
    found.done.update({name: 3 for name in (*REQUESTS, *CONTROL, *SWITCHES)})
    found.faults = {"SIGTERM": GONE}
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def judged(found: Soaked) -> list[str]:
    return verdict(found, 64, (*REQUESTS, *CONTROL))


def test_a_server_that_comes_through_is_told_so():
    assert judged(well()) == []
    assert "**Passed** after 30.0 minutes" in to_markdown(well(), 64, [], {})


def planted(name):
    found = well()
    match name:
        case "a leak":
            found.errors["a leak: an idle server refuses to flush for 20 s"] += 1
        case "a difference":
            found.different.append("soak-3-1")
        case "a growth":
            found.memory = [Memory(m.seconds, m.resident | {"scheduler": 900 + m.seconds / 40}) for m in found.memory]
        case "an alarm":
            found.alarms = alarms("ok\nValueError: KV cache Mem Leak of 3\n")
        case "a process":
            found.memory[-1].resident["spawn_main"] = 5.0
        case "a kind":
            del found.done["schema"]
        case "no rounds":
            found.effects["rounds"] = 0
        case "nothing compared":
            found.compared = 0
        case "a survivor":
            found.faults = {"SIGTERM": "still there after 180 s: sglang::scheduler"}
    return found


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a leak", "1 x a leak: an idle server refuses"),
        ("a difference", "soak-3-1: not stock's reply"),
        ("a growth", "scheduler: grows by 90 MiB an hour, more than 64"),
        ("an alarm", "in the log: ValueError: KV cache Mem Leak of 3"),
        ("a process", "spawn_main: a process that was not there at the start"),
        ("a kind", "never done: schema"),
        ("no rounds", "the server counted no rounds"),
        ("nothing compared", "no token was compared"),
        ("a survivor", "SIGTERM: still there"),
    ],
)
def test_what_is_planted_goes_red(name, line):
    found = planted(name)
    [wrong] = judged(found)
    assert wrong.startswith(line)
    page = to_markdown(found, 64, [wrong], {"seed": 0})
    assert "**Failed**" in page and wrong in page
    assert json.loads(json.dumps(to_json(found, 64, [wrong], {})))["wrong"] == [wrong]


def test_growth_is_that_of_the_second_half_and_short_runs_are_not_judged():
    slope, seconds = growth(well().memory, "scheduler")
    assert abs(slope) < 5 and seconds == 870
    short = well(memory=[Memory(10.0 * i, {"scheduler": 900 + i}) for i in range(12)])
    assert growth(short.memory, "scheduler")[0] == pytest.approx(360)
    assert judged(short) == [] and "too short to judge" in to_markdown(short, 64, [], {})


def test_growth_is_judged_beyond_that_of_a_stock_server_seen_long_enough():
    def grows(by, count=60):
        return [Memory(30.0 * i, {"scheduler": 900 + by * 30.0 * i / 3600}) for i in range(count)]

    alone = well(memory=grows(90))
    assert judged(alone) == ["scheduler: grows by 90 MiB an hour, more than 64"]
    assert judged(well(memory=grows(90), beside=well(memory=grows(40)))) == []
    assert judged(well(memory=grows(90), beside=well(memory=grows(20)))) == [
        "scheduler: grows by 90 MiB an hour, more than 84"
    ]
    assert judged(well(memory=grows(90), beside=well(memory=grows(40, 12)))) == judged(alone), "too short a time"
    assert judged(well(memory=grows(90), beside=well(memory=grows(-40)))) == judged(alone), "what shrinks lends nothing"


def test_the_page_has_a_stock_servers_memory_and_errors():
    beside = well(seconds=600, memory=[Memory(30.0 * i, {"router": 7}) for i in range(60)])
    page = to_markdown(well(beside=beside), 64, [], {})
    assert "A stock server after 10.0 minutes" in page and "| router | 7 | 7 | 7 |" in page and "no error" in page
    beside.errors["chat: HTTP 500"] = 2
    assert "- 2 x chat: HTTP 500" in to_markdown(well(beside=beside), 64, [], {})
    plain = json.loads(json.dumps(to_json(well(beside=beside), 64, [], {})))["beside"]
    assert plain["growth_mib_per_hour"] == {"router": 0.0} and plain["errors"] == {"chat: HTTP 500": 2}


@pytest.mark.parametrize("line", ["Mem Leak", "a memory leak", "double free", "Traceback (most recent call last):"])
def test_the_log_is_read_for_every_alarm(line):
    assert alarms(f"fine\n[12:00] {line}\nserver_args=ServerArgs('Traceback')\n") == [f"[12:00] {line}"]


# -- requests ----------------------------------------------------------------------------------------------------------


def asked(kind: str) -> Request:
    return next(r for wave in waves(0) for r in wave.requests if r.kind == kind)


def called(name="look_up", arguments='{"subject": "x", "volume": "first"}', **more):
    calls = more.get("calls", [{"function": {"name": name, "arguments": arguments}}])
    return {"choices": [{"finish_reason": "tool_calls", "message": {"tool_calls": calls}}]}


def answer(text="fine", ended="stop", tokens=4, **more):
    meta = {"finish_reason": {"type": ended}, "completion_tokens": tokens, "output_token_logprobs": [0] * tokens}
    return {"text": text, "output_ids": list(range(tokens)), "meta_info": meta | more}


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("stop", answer("no end"), answer("an end.")),
        ("regex", answer("yes, because it is so."), answer("yes")),
        ("schema", answer('{"name": "x", "age": 1}'), answer('{"name": 1}')),
        ("schema", answer('{"name', "length"), answer("{")),
        ("logprobs", answer(), answer(output_token_logprobs=[0])),
        ("long", answer(ended="length", tokens=192), answer(ended="length", tokens=191)),
        ("none", answer(ended="length"), answer(ended="abort")),
        ("none", answer(), answer(tokens=65)),
        ("n", {"choices": [1, 2, 3]}, {"choices": [1, 2]}),
        ("tools", called(), called(name="look")),
        ("tools", called(), called(arguments='{"subject": "x"}')),
        ("tools", called(), called(arguments="{")),
        ("tools", {"choices": [{"finish_reason": "length"}]}, called(calls=None)),
        ("chat", {"choices": [1]}, {"choices": []}),
    ],
)
def test_a_reply_is_checked_against_what_was_asked_for(kind, right, wrong):
    check(asked(kind), right)
    with pytest.raises(Wrong):
        check(asked(kind), wrong)


def test_replies_are_compared_up_to_the_first_close_second():
    tops = [
        [[-0.1, 7, None], [-3.0, 8, None]],
        [[-0.5, 4, None], [-0.9, 1, None]],
        [[-0.700, 5, None], [-0.705, 6, None]],
    ]
    reply = {"output_ids": [7, 4, 5], "meta_info": {"output_top_logprobs": tops}}
    recorded = Recorded({"q": decided(reply)})
    assert recorded.replies == {"q": [7, 4]}
    assert recorded.same("q", [7, 4, 6]) and recorded.same("q", [7, 4])
    assert not recorded.same("q", [7, 5, 5]) and not recorded.same("q", [7])


# -- a server's double -------------------------------------------------------------------------------------------------


class Double:
    """What a soak uses of a server, without one."""

    status = None

    def __init__(self, log: Path, **answers):
        self.log, self.posted, self.answers, self.pid = log, [], answers, os.getpid()
        self._lock = threading.Lock()
        log.write_text("ready\n")

    def post(self, path, body, timeout=0):
        with self._lock:
            self.posted.append((path, body))
        if (found := self.answers.get(path)) is not None:
            return found(body)
        if path == "/flush_cache":
            return "Cache flushed."
        if path == "/update_weights_from_disk":
            return '{"success": true, "message": ""}'
        if "tools" in body:
            return json.dumps(called())
        if "messages" in body:
            return json.dumps({"choices": [1] * body["n"]})
        params = body.get("sampling_params", {})
        text = {"json_schema": '{"name": "x", "age": 1}', "regex": "no, because of that."}
        made = next((text[key] for key in text if key in params), "fine")
        return json.dumps(answer(made, "length" if "ignore_eos" in params else "stop", params.get("max_new_tokens", 0)))

    def stream(self, path, body, timeout=0):
        yield from ({"choices": [1]} for _ in range(60))

    def get(self, path):
        pressed = len([path for path, _ in self.posted if path == "/kv_evict"]) % 2  # as the switches go
        pressure = {"events": 3} if pressed else None
        return {"internal_states": [{"lethe": {"rounds": 5, "requests_retracted": 2, "pressure": pressure}}]}

    def stop(self, grace=0):
        self.status = -9


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run, "PAUSED_SECONDS", 0)
    monkeypatch.setattr(run, "FLUSH_SECONDS", 0.3)


def hurried(count, seed=0):
    """Waves without waits."""
    for wave in first(count, seed):
        requests = tuple(Request(**(vars(r) | {"after": min(r.after, 5)})) for r in wave.requests)
        yield Wave(wave.number, requests, tuple((0.0, act) for _, act in wave.control), wave.then)


REPLIES = Recorded({untouched(question, 1)["text"]: [0, 1, 2] for question in QUESTIONS})


def traffic(server, count=6, replies=REPLIES) -> Soaked:
    found = Soaked()
    Traffic(server, replies, found, Path("model"), lambda line: None).run(hurried(count), 3600)
    return found


def test_waves_do_all_that_they_should_and_are_counted(tmp_path, quick):
    server = Double(tmp_path / "log")
    found = traffic(server)
    assert not found.errors and verdict(found, 64, (*REQUESTS, *CONTROL)) == []
    assert sum(found.done[kind] for kind in REQUESTS) == 36 and found.done["flush when idle"] == 6
    assert found.compared == 3 * found.done["none"] >= 9 and len(found.memory) == 6
    paths = [path for path, _ in server.posted]
    assert paths.count("/pause_generation") == paths.count("/continue_generation") == 9
    modes = [body["mode"] for path, body in server.posted if path == "/pause_generation"]
    assert modes == ["retract", "in_place", "retract"] * 3
    switched = [body["rounds"]["when"] for path, body in server.posted if path == "/kv_evict"]
    assert switched == ["pressure", "always"] * 3
    assert found.effects == {"rounds": 5, "events of pressure": 3, "requests retracted": 2}


def test_a_stock_server_gets_the_same_without_what_it_does_not_know(tmp_path, quick):
    server, found = Double(tmp_path / "log"), Soaked()
    server.get = refuse
    Traffic(server, REPLIES, found, Path("model"), print, evicts=False).run(hurried(6), 3600)
    assert verdict(found, 64, (*REQUESTS, *CONTROL)) == [] and len(found.memory) == 6
    assert "/kv_evict" not in [path for path, _ in server.posted]


def refuse(body):
    raise urllib.error.HTTPError("/", 400, "no", None, BytesIO(b"not idle"))


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        ({"/flush_cache": refuse}, "a leak: an idle server refuses to flush"),
        ({"/kv_evict": refuse}, "pressure: the connection broke (HTTPError)"),
        ({"/update_weights_from_disk": lambda body: '{"success": false, "message": "no"}'}, "weights: no"),
        ({"/generate": refuse}, "none: HTTP 400: not idle"),
    ],
)
def test_what_a_server_refuses_is_an_error(answers, line, tmp_path, quick):
    found = traffic(Double(tmp_path / "log", **answers), 3)
    assert any(error.startswith(line) for error in found.errors), found.errors
    assert verdict(found)


def test_an_update_that_could_not_flush_is_none_that_failed(tmp_path, quick):
    def unflushed(body):
        text = json.dumps({"success": False, "message": f"{run.UPDATED} because requests are still running or queued."})
        raise urllib.error.HTTPError("/", 400, "no", None, BytesIO(text.encode()))

    found = traffic(Double(tmp_path / "log", **{"/update_weights_from_disk": unflushed}), 3)
    assert not found.errors and found.done["weights"] == 1


def test_a_pause_ends_whatever_happens_in_it(tmp_path, quick):
    server = Double(tmp_path / "log", **{"/update_weights_from_disk": refuse})
    traffic(server, 3)
    assert [path for path, _ in server.posted].count("/continue_generation") == 5


def test_another_reply_than_stocks_is_seen(tmp_path, quick):
    found = traffic(Double(tmp_path / "log"), 6, Recorded({prompt: [0, 1, 9] for prompt in REPLIES.replies}))
    assert 3 * len(found.different) == found.compared > 0 and verdict(found)


def test_what_stock_did_not_decide_is_no_comparison(tmp_path, quick):
    found = traffic(Double(tmp_path / "log"), 3, Recorded({prompt: [] for prompt in REPLIES.replies}))
    assert verdict(found, 64) == ["no token was compared with stock's"]


def test_the_log_is_read_once_and_to_its_end(tmp_path, quick):
    server = Double(tmp_path / "log")

    def talk(body):
        with server.log.open("a") as log:
            log.write("Traceback (most recent call last):\n")
        return "{}"

    server.answers["/kv_evict"] = talk
    assert len(traffic(server, 3).alarms) == 2


def test_a_dead_server_ends_the_traffic(tmp_path, quick):
    server = Double(tmp_path / "log")

    def die(body):
        server.status = 1
        raise ConnectionResetError

    server.answers["/pause_generation"] = die
    found = traffic(server)
    assert found.errors["the server ended with status 1"] == 1 and len(found.memory) == 0


def test_ctrl_c_ends_the_server_and_keeps_what_was_found(tmp_path, quick, monkeypatch):
    server, found = Double(tmp_path / "log"), Soaked()

    def press(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.time, "sleep", press)
    with pytest.raises(KeyboardInterrupt):
        Traffic(server, REPLIES, found, Path("model"), print).run(hurried(2), 3600)
    assert found.interrupted and server.status == -9


def test_an_abort_that_is_told_as_an_error_is_no_error_and_a_short_stream_is_one(tmp_path):
    def aborted(body):
        raise urllib.error.HTTPError("/", 503, "no", None, BytesIO(b"Abort in waiting queue"))

    abort, away = asked("abort"), asked("disconnect")
    assert put(Double(tmp_path / "log", **{"/generate": aborted}), abort) == {}
    server = Double(tmp_path / "log")
    server.stream = lambda *args: (event for event in [{}])
    with pytest.raises(Wrong, match="after 1 events"):
        put(server, away)


# -- ends --------------------------------------------------------------------------------------------------------------

SERVING = """
import http.server, signal, subprocess, sys, threading, time
port, how = int(sys.argv[1]), sys.argv[2]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60) # scheduler", "resource_tracker"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        time.sleep(30)
    def log_message(self, *words): pass
def leave(*signal):
    if how != "orphan":
        child.kill()
        child.wait()
    import os; os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if how == "deaf" else leave)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.parametrize(
    ("how", "outcome"),
    [("well", GONE), ("orphan", "still there after 1 s: resource_tracker"), ("deaf", "still there after 1 s: ")],
)
def test_what_stays_when_a_server_is_ended_is_named(how, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(ends, "LOADED_SECONDS", 0.2)
    port = some_free_port()
    with Server([sys.executable, "-c", SERVING, str(port), how], port, tmp_path / "log") as server:
        assert "resource_tracker" in of_session(server.pid) and min(of_session(server.pid).values()) > 1
        found = ended_under_load(server, [{}, {}], lambda: kill(server.pid, "SIGTERM"), 1)
    assert found.startswith(outcome)


def test_memory_is_what_a_process_has_beside_pages_of_files(tmp_path):
    (tmp_path / "file").write_bytes(bytes(2**26))
    code = "import mmap, sys; file = open(sys.argv[1], 'rb'); m = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); "
    code += "m.find(b'x'); own = b'x' * int(sys.argv[2]); print(flush=True); sys.stdin.read()"
    sizes = []
    for own in (1, 2**25):
        command = [sys.executable, "-c", code, str(tmp_path / "file"), str(own)]
        with subprocess.Popen(command, stdin=-1, stdout=-1, start_new_session=True) as child:
            child.stdout.readline()
            sizes += of_session(child.pid).values()
            child.stdin.close()
    assert sizes[0] < 40 and 30 < sizes[1] - sizes[0] < 34


def test_without_load_an_end_proves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ends, "LOADED_SECONDS", 0.1)
    assert ended_under_load(Double(tmp_path / "log"), [{}], lambda: None) == "every request had ended before the signal"


# -- program -----------------------------------------------------------------------------------------------------------


class Fake(run.Soak):
    """A soak that finds what it is told to."""

    end: BaseException | None = None

    def record(self):
        return REPLIES

    def beside(self, waves, seconds, recorded):
        self.found.beside = well(memory=[])

    def run(self, waves, seconds, recorded):
        vars(self.found).update(vars(well()))
        if self.end is not None:
            raise self.end


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        (None, 0, "**Passed**"),
        (program.ServerError("the server was not ready after 900 s:\nlog"), 1, "1 x the server was not ready"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (SystemExit(143), 143, "Interrupted"),
    ],
)
def test_the_page_is_written_however_it_ends(end, status, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "Soak", Fake)
    monkeypatch.setattr(Fake, "end", end)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert program.main(["--model-path", str(model), "--out", str(tmp_path / "out")]) == status
    page = (tmp_path / "out" / "soak.md").read_text()
    assert said in page and str(tmp_path) not in page and page in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "soak.json").read_text())["compared"] == 12


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--minutes", "0"], "--minutes: got '0', expected a number above 0"),
        (["--growth", "nan"], "--growth: got 'nan'"),
        (["--model-path", "/nowhere"], "--model-path /nowhere: no model there"),
        (["--out", "/dev/null/x"], "--out /dev/null/x: "),
    ],
)
def test_a_bad_option_is_one_line(arguments, line, capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with contextlib.suppress(SystemExit):
        assert program.main(["--model-path", str(tmp_path), *arguments]) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
