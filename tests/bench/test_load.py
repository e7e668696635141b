"""``lethe load`` and ``lethe burst``: plans, what is timed and counted, going on after a stop, pages and pictures."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest

from lethe_bench.cli import burst as burst_cli
from lethe_bench.cli import load as load_cli
from lethe_bench.load import report
from lethe_bench.load import run as load_run
from lethe_bench.load.plan import Burst, Sweep
from lethe_bench.load.run import Requests, measure
from lethe_bench.machine import CpuMeter
from lethe_bench.servers import Server, ServerError, some_free_port
from lethe_bench.throughput.report import About
from lethe_sglang.cli import main as program
from lethe_sglang.config import ConfigError, resolve
from lethe_sglang.config.changes import reconfigured

MODEL = str(Path(__file__).parents[2] / "models" / "reasoner-dev")
CONFIG = resolve("lethe", '{"rounds": {"interval": 16}}', 48)
SWEEP = Sweep(model_path=MODEL, config=CONFIG, input_len=8, output_len=80, max_total_tokens=256)
BURST = Burst(
    model_path=MODEL,
    config=CONFIG,
    input_len=8,
    output_len=80,
    max_total_tokens=256,
    long_requests=2,
    short_requests=3,
    short_input_len=4,
    short_output_len=5,
    after=90,
)
ABOUT = About("lethe load", {"cpu": "Some CPU", "cores": 2, "memory_gib": 23.0, "gpus": []}, {"sglang": "0.5.23"})


class Served(Server):
    """A server of requests that march in step, a token a tenth of a second, by a clock that tests can read.

    Stock retracts and the evicting arms run rounds when more than two requests are there at once; always runs rounds
    and says something else than stock at any load.
    """

    served: list = []  # noqa: RUF012
    told: list = []  # noqa: RUF012
    starts = 0
    now = 0.0
    short_done = Event()
    breaks_after = 10**6

    def __enter__(self):
        source = dict(zip(self.command, self.command[1:], strict=False)).get("--kv-evict-config")
        self.config = resolve(None, source) if source else None
        self.log.write_text("started\n")
        self.rounds = 0
        Served.starts += 1
        return self

    @property
    def arm(self):
        if self.config is None:
            return "stock"
        return "idle" if self.config.budget.tokens > 100 else self.config.rounds.when

    def stop(self, grace=0):
        pass

    @property
    def pid(self):
        return 1

    def get(self, path, timeout=60):
        names = ("round_launches", "round_seconds", "requests_pruned", "requests_retracted", "blocks_freed_total")
        levels = ("policy", "budget_tokens", "interval", "recent", "layers", "held_peak_request", "auxiliary_bytes")
        state = {
            **dict.fromkeys((*names, *levels), 0),
            "rounds": self.rounds,
            "tokens_evicted_per_layer": [self.rounds],
        }
        if self.arm == "pressure":
            state["pressure"] = {"events": self.rounds // 2, "share": 60, "at_floor": 0, "tokens_evicted": self.rounds}
        return {"device": "cpu", "page_size": 1, "internal_states": [{} if self.arm == "stock" else {"lethe": state}]}

    def post(self, path, body, timeout=600):
        if path == "/kv_evict":
            Served.told.append(sorted(body))
            self.config = reconfigured(self.config, body)
        return "{}"

    def stream(self, path, body, timeout=600):
        prompts, output = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        assert body["stream"] and body["sampling_params"]["ignore_eos"]
        Served.served.append((self.arm, len(prompts)))
        if len(Served.served) > self.breaks_after:
            raise ConnectionResetError("gone")
        crowded = len(prompts) > 2
        self.rounds += {"stock": 0, "idle": 0, "always": 4, "pressure": 4 * crowded}[self.arm]
        unlike = self.arm == "always" or (self.arm == "pressure" and crowded)
        with self.log.open("a") as log:
            for step in range(output):
                print(f"Decode batch, #running-req: {len(prompts)}, #token: {len(prompts) * (step + 1)},", file=log)
            if crowded and self.arm == "stock":
                print("KV cache pool is full. Retract requests. #retracted_reqs: 2, #new_tokens_gained: 1", file=log)
        for step in range(output):
            Served.now += 0.1 * (2 if self.arm == "stock" else 1)
            for index, prompt in enumerate(prompts):
                token = (prompt[0] + step + (unlike and step > 40)) % 1000
                yield {"index": index, "output_ids": [token], "meta_info": {}}


class Burning(Served):
    """Of two long requests; the short ones are served when these have 45 tokens each, and then nothing else is."""

    def stream(self, path, body, timeout=600):
        short = len(body["input_ids"]) == BURST.short_requests
        for number, event in enumerate(super().stream(path, body, timeout)):
            if not short and number == 100:  # 90 were asked for; the rest of these come while the short ones wait
                assert Served.short_done.wait(10)
            yield event
        if short:
            Served.short_done.set()


@pytest.fixture
def served(monkeypatch):
    Served.served, Served.now, Served.breaks_after, Served.short_done = [], 0.0, 10**6, Event()
    Served.told, Served.starts = [], 0
    monkeypatch.setattr(load_run, "time", SimpleNamespace(monotonic=lambda: Served.now))
    monkeypatch.setattr(load_run, "Server", Served)
    monkeypatch.setattr(load_run, "warm_up", lambda server, plan: None)

    class Meter:
        def __init__(self, server, itself):
            assert itself, "requests are sent from here"
            self.began = Served.now

        def others(self):
            return 0.01

        def server(self):
            return (Served.now - self.began) / 2

    monkeypatch.setattr(load_run, "CpuMeter", Meter)


def a_server(kind, plan, arm, tmp_path):
    server = kind(plan.server_command(arm), 1, tmp_path / "log")
    return server.__enter__()


def ask(name, out, *more):
    sizes = [
        "--budget",
        "48",
        "--interval",
        "16",
        "--input-len",
        "8",
        "--output-len",
        "80",
        "--max-total-tokens",
        "256",
    ]
    rest = ["--repeats", "2", "--out", str(out), "--port", str(some_free_port())]
    return program.main([name, "--model-path", MODEL, *sizes, *rest, *more])


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_the_arms_differ_in_the_eviction_flags_alone_and_two_in_when_alone():
    stock, idle, always, pressure = (SWEEP.server_command(arm) for arm in SWEEP.legal_arms)
    assert idle[: len(stock) - 1] == always[: len(stock) - 1] == pressure[: len(stock) - 1] == stock[:-1]
    assert not any("kv-evict" in word for word in stock)
    found = {arm: SWEEP.arm_config(arm).model_dump() for arm in ("always", "pressure")}
    assert [found[arm]["rounds"].pop("when") for arm in found] == ["always", "pressure"]
    assert found["always"] == found["pressure"]
    assert SWEEP.arm_config("idle").budget.tokens > 88 and SWEEP.arm_config("idle").rounds.when == "always"


def test_every_load_has_the_first_prompts_of_a_larger_one():
    _, some = SWEEP.prompts(3, 1000)
    _, more = SWEEP.prompts(5, 1000)
    assert more[:3] == some and len({tuple(prompt) for prompt in more}) == 5 and len(some[0]) == 8
    long, short = BURST.prompts(3, 1000)
    assert [len(prompt) for prompt in long + short] == [8, 8, 4, 4, 4]


def test_the_short_ones_come_when_the_pool_would_be_full_or_at_half_the_output():
    assert replace(BURST, after=None, max_total_tokens=90).moment == 90 - 2 * 8
    assert replace(BURST, after=None).moment == 80
    assert BURST.moment == 90 and BURST.loads == (3,)


@pytest.mark.parametrize(
    ("plan", "changes", "message"),
    [
        (SWEEP, {"arms": ("stock", "lethe")}, "--arms: unknown arm 'lethe'; give one or more of stock,idle,always,p"),
        (SWEEP, {"max_total_tokens": 90}, "--max-total-tokens 90: cannot hold .* at least 91"),
        (SWEEP, {"output_len": 49, "arms": ("pressure",)}, "--budget 48 with --interval 16: .* due at 49"),
        (BURST, {"after": 160}, "--after 160: the 2 long requests have 160 output tokens in all; give at most 159"),
        (BURST, {"short_output_len": 85}, "--short-output-len 85: .*; give at most 84, or a shorter prompt"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_with_a_legal_value(plan, changes, message):
    plan.check()
    with pytest.raises(ConfigError, match=message):
        replace(plan, **changes).check()


@pytest.mark.parametrize("given", ["", "0,1", "4,2", "2,2", "1;2"])
def test_loads_increase(given, capsys):
    with pytest.raises(SystemExit):
        ask("load", "out", "--loads", given)
    assert "expected increasing integers >= 1, such as 1,8,64" in capsys.readouterr().err


# -- what is timed and counted -----------------------------------------------------------------------------------------


class Scripted(Served):
    """Sends what a test says: seconds on the clock, and an event."""

    def stream(self, path, body, timeout=600):
        for now, event in self.script:
            Served.now = now
            yield event


def scripted(tmp_path, *script, prompts=2, output=2, tokens=0):
    server = a_server(Scripted, SWEEP, "stock", tmp_path)
    server.script = script
    return Requests(server, [[1]] * prompts, output, 10, tokens)


def test_a_request_waits_until_its_own_first_token(served, tmp_path):
    Served.now = 10.0
    events = [(11.0, 0, [5]), (12.0, 1, []), (14.0, 1, [6, 7]), (15.0, 0, [8])]
    found = scripted(tmp_path, *((now, {"index": index, "output_ids": ids}) for now, index, ids in events), tokens=3)
    found.read()
    assert found.ttfts == [1.0, 4.0] and (found.began, found.ended) == (10.0, 15.0)
    assert found.replies == [[5, 8], [6, 7]]
    assert [found.tokens_at(moment) for moment in (10.5, 11, 14.5, 20)] == [0, 1, 3, 4]
    assert found.reached.is_set()


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"index": 0, "output_ids": [1]}, "2 of 2 requests got another number of tokens than 2, one of them 1"),
        ({"error": {"message": "too long"}}, "the server gave a request up: .*too long"),
    ],
)
def test_requests_that_lack_tokens_are_an_error(served, tmp_path, event, message):
    with pytest.raises(ServerError, match=message):
        scripted(tmp_path, (1.0, event)).read()


def test_short_requests_come_at_their_moment_and_the_long_ones_are_counted_until_they_are_done(served, tmp_path):
    found = measure(a_server(Burning, BURST, "always", tmp_path), BURST, "always", 1, 3, 1000)
    assert Served.served == [("always", 2), ("always", 3)]
    assert found.numbers["long_tokens"] + found.progress[0][1] <= 10 + 1, "100 of theirs were there at most, 90 before"
    assert found.numbers["rounds"] == 8 and len(found.replies) == 5
    assert found.numbers["held_before"] > 0 and len(found.ttfts) == 3
    assert found.numbers["output_throughput"] == pytest.approx(
        (3 * 5 + found.numbers["long_tokens"]) / found.numbers["seconds"]
    )


def test_retractions_of_stock_are_read_from_its_log_and_events_from_the_plugin(served, tmp_path):
    stock = measure(a_server(Served, SWEEP, "stock", tmp_path), SWEEP, "stock", 1, 3, 1000)
    assert (stock.numbers["retracted_requests"], stock.numbers["rounds"], stock.numbers["tokens_peak"]) == (2, 0, 240)
    pressed = measure(a_server(Served, SWEEP, "pressure", tmp_path), SWEEP, "pressure", 1, 3, 1000)
    assert (pressed.numbers["events"], pressed.numbers["rounds"], pressed.numbers["retracted_requests"]) == (2, 4, 0)
    assert pressed.numbers["server_cpu"] == pytest.approx(80 * 0.1 / 2 / (3 * 80)), "half of 0.1 s a step, for three"
    calm = measure(a_server(Served, SWEEP, "pressure", tmp_path), SWEEP, "pressure", 1, 2, 1000)
    assert calm.numbers["rounds"] == 0


def test_the_meter_counts_this_process_to_the_others_unless_it_is_a_client():
    server = SimpleNamespace(pid=-1)
    meters = [CpuMeter(server), CpuMeter(server, itself=True)]
    of_this_session = CpuMeter(SimpleNamespace(pid=os.getsid(0)))
    exec("import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass")
    other, itself = (meter._read()[3] - meter._start[3] for meter in meters)
    assert other < 0.1 and itself > 0.25
    assert meters[0].server() == 0 and of_this_session.server() > 0.25


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_sweep_goes_on_where_it_was_stopped(served, tmp_path, capsys):
    Served.breaks_after = 5
    assert ask("load", tmp_path, "--loads", "1,2,4") == 1
    assert "lethe load: error: the server is gone (gone)" in capsys.readouterr().err
    assert "**Unfinished**: 5 of 18 measurements." in (tmp_path / "load.md").read_text()
    Served.breaks_after = 10**6
    done, Served.served = Served.served[:5], []
    assert ask("load", tmp_path, "--loads", "1,2,4") == 0
    assert sorted(done + Served.served) == sorted(
        2 * [(a, n) for a in ("stock", "always", "pressure") for n in (1, 2, 4)]
    )
    assert Served.served[0] == ("always", 4) and Served.served[-1] == ("pressure", 4)
    Served.served = []
    assert ask("load", tmp_path, "--loads", "1,2,4,8") == 0, "more loads may be asked for"
    assert Served.served == 2 * [("stock", 8), ("always", 8), ("pressure", 8)]
    assert ask("load", tmp_path, "--loads", "1,2", "--seed", "2") == 2
    assert "holds samples of another run (other seed); give another" in capsys.readouterr().err


def test_the_page_of_a_sweep_says_at_which_load_replies_are_no_longer_stock_s(served, tmp_path, capsys):
    assert ask("load", tmp_path, "--loads", "1,2,4") == 0
    page = (tmp_path / "load.md").read_text()
    assert page == capsys.readouterr().out and "](load.svg)" in page and "Unfinished" not in page

    def rows(title):
        table = page.partition(f"**{title}**")[2].split("\n\n")[1].splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]

    assert rows(report.DIFFER) == [["1", "0", "1", "0"], ["2", "0", "2", "0"], ["4", "0", "4", "4"]]
    assert rows("requests retracted") == [["1", "0", "0", "0"], ["2", "0", "0", "0"], ["4", "2", "0", "0"]]
    assert rows("rounds") == [["1", "0", "4", "0"], ["2", "0", "4", "0"], ["4", "0", "4", "4"]]
    assert rows("output throughput")[0][:4] == ["1", "2", "2", "1"], "stock takes twice the time a token"
    assert rows("the server's CPU time per output token")[0][:4] == ["1", "0.5", "0.5", "1"]
    assert "Absolute times on a shared CPU mean nothing" in page and "## Speeds" not in page
    assert (tmp_path / "load.svg").read_text().startswith("<?xml")
    data = json.loads((tmp_path / "load.json").read_text())
    assert data["ratios"]["4"]["pressure / stock"]["output throughput"]["median"] == pytest.approx(2)
    assert data["configs"]["pressure"]["rounds"]["when"] == "pressure" and len(data["samples"]) == 18
    assert str(Path(MODEL).parent) not in (tmp_path / "samples.jsonl").read_text() + json.dumps(data)
    before = (tmp_path / "load.svg").read_bytes()
    assert ask("load", tmp_path, "--loads", "1,2,4") == 0 and (tmp_path / "load.svg").read_bytes() == before


def test_ample_memory_is_compared_with_the_arm_that_is_never_due(served, tmp_path):
    assert ask("load", tmp_path, "--loads", "2", "--arms", "stock,idle,pressure") == 0
    page = (tmp_path / "load.md").read_text()
    assert "| output throughput | 2 | 1 | 2 |" in page and "pressure / stock | pressure / idle | idle / stock" in page
    assert f"| {report.DIFFER} | 0 | 0 | 0 |" in page and "| rounds | 0 | 0 | 0 |" in page


def test_one_server_takes_the_arms_in_turn_each_repeat_the_other_way_round(served, tmp_path, capsys):
    Served.breaks_after = 5
    options = ("--loads", "1,2", "--arms", "idle,pressure", "--one-server")
    assert ask("load", tmp_path, *options) == 1
    capsys.readouterr()
    assert Served.served[:5] == [("idle", 1), ("idle", 2), ("pressure", 1), ("pressure", 2), ("pressure", 1)]
    Served.breaks_after, Served.served, Served.starts = 10**6, [], 0
    assert ask("load", tmp_path, *options) == 0
    assert (Served.starts, Served.served) == (1, [("pressure", 2), ("idle", 1), ("idle", 2)])
    assert all(told == ["budget", "rounds"] for told in Served.told)
    page = capsys.readouterr().out
    assert "one server, which takes the arms' configurations in turn" in page and " --one-server\n" in page
    assert ask("load", tmp_path, *options) == 0 and Served.starts == 1, "nothing is missing"
    assert ask("load", tmp_path, "--loads", "1", "--one-server") == 2
    assert "--one-server: a server of stock takes no configuration; give --arms idle,always" in capsys.readouterr().err


def test_a_burst_has_a_page_with_both_kinds_of_requests(served, monkeypatch, tmp_path):
    sizes = ["--long-requests", "2", "--short-requests", "3", "--short-input-len", "4", "--short-output-len", "5"]
    assert ask("burst", tmp_path, *sizes, "--after", "90") == 0
    page = (tmp_path / "burst.md").read_text()
    assert "2 requests of 8 + 80 tokens and, once they have 90 output tokens, 3 of 4 + 5, all at once" in page
    for row in ("time to first token, p90", "output tokens of the long requests meanwhile", "requests retracted"):
        assert f"| {row} |" in page
    assert "pressure / stock | always / stock | pressure / always" in page and "](burst.svg)" in page
    assert (tmp_path / "burst.svg").read_text().startswith("<?xml")


def test_the_command_is_written_down_as_it_was_given(tmp_path):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command")
    load_cli.add_parser(subparsers)
    burst_cli.add_parser(subparsers)
    args = parser.parse_args(["load", "--model-path", MODEL, "--loads", "1,8", "--out", str(tmp_path)])
    from lethe_bench.cli.bench import about_of, plan_of

    command = about_of(args, plan_of(args, Sweep, ("loads",))).command
    assert command.startswith("lethe load --model-path reasoner-dev") and "--loads 1,8" in command


def test_a_page_without_a_sample_says_so():
    assert "**Unfinished**: 0 of 63 measurements." in report.to_markdown(SWEEP, [], ABOUT)
