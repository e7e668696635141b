"""The goals of the GPU suite as far as they go without a GPU: limits, verdicts, windows. Every figure is made up."""

import argparse
import json
import sys
import threading

import pytest

from lethe_bench.gpu import base, goal, goals
from lethe_bench.gpu.goal import STOPPING_SECONDS, Bound, Goal, Limit, measure
from lethe_bench.gpu.goals import BATCH, GOALS
from lethe_bench.gpu.steps import Step, read_steps, stalls, throughput
from lethe_bench.servers import ServerError
from lethe_sglang.cli.main import main
from lethe_sglang.config import from_mapping


def line(running=64, held=1000, speed=6400.0, waiting=0):
    return (
        f"[2000-01-01 00:00:00] Decode batch, #running-req: {running}, #token: {held}, token usage: 0.5, lethe: x, "
        f"cuda graph: True, gen throughput (token/s): {speed:.2f}, #queue-req: {waiting}\n"
    )


PREFILL = "[2000-01-01 00:00:00] Prefill batch, #new-seq: 1, #new-token: 64\n"

# -- steps -------------------------------------------------------------------------------------------------------------


def test_a_step_takes_what_its_line_divides():
    steps = read_steps(line() + PREFILL + PREFILL + line(32, 500, 1600.0, 3) + line(speed=0.0) + line()[:-9])
    assert steps == [Step(64, 1000, 0, 0.01, 0), Step(32, 500, 3, 0.02, 2)], "a line that is torn has no queue yet"
    assert throughput(steps) == 96 / 0.03


def test_a_stall_is_what_a_step_takes_longer_than_its_neighbours():
    slower = [Step(64, 0, 0, 0.010 + 0.0001 * n, 0) for n in range(200)]  # lists that grow are no stall
    slower[100] = slower[100]._replace(seconds=slower[100].seconds + 0.007)
    found = stalls(slower)
    assert max(found) == found[100] == pytest.approx(0.007, abs=2e-4)
    assert sum(stall > 0.005 for stall in found) == 1


# -- limits and verdicts -----------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class Two(Goal):
    name, asks, sizes, repeats, arm_seconds = "two", "test", "test", 2, 1.0
    bound = Bound(0.97, "x", at_least=True)

    def __init__(self, clock, takes=100.0, speeds=(), broken=None):
        self.clock, self.takes, self.speeds, self.broken, self.order = clock, takes, list(speeds), broken, []

    def arms(self, samples):
        return ["stock", "lethe"]

    def runs(self, arm, samples=()):
        return f"run {arm}"

    def sample(self, arm, samples, left):
        self.order.append(arm)
        if len(self.order) == self.broken:
            raise ServerError("the server ended with status 1")
        self.clock.now += self.takes
        return {"speed": self.speeds.pop(0) if self.speeds else 100.0}

    def judged(self, repeat):
        return {"of stock's": repeat["lethe"]["speed"] / repeat["stock"]["speed"]}


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goal, "time", clock)
    return clock


def test_arms_alternate_and_every_sample_is_kept_at_once(clock):
    kept, two = [], Two(clock)
    found = measure(two, Limit(480), kept.append)
    assert two.order == ["stock", "lethe", "lethe", "stock"]
    assert [len(result["samples"]) for result in kept] == [1, 2, 3, 4, 4]
    assert [result["met"] for result in kept] == [None, None, None, True, True] and found["missing"] == []
    assert found["judged"]["of stock's"] == {"median": 1.0, "smallest": 1.0, "largest": 1.0, "values": [1.0, 1.0]}
    assert found["settings"] == {"stock": "run stock", "lethe": "run lethe"} and found["spent_s"] == 400


@pytest.mark.parametrize("limit, samples", [(200, 1), (221, 2), (380, 2), (420, 2), (421, 4)])
def test_a_run_cut_by_the_limit_gives_no_verdict(clock, limit, samples):
    found = measure(Two(clock), Limit(limit), lambda _: None)
    assert len(found["samples"]) == samples and clock.now <= limit - STOPPING_SECONDS
    if samples == 4:
        assert found["met"] is True and found["missing"] == []
    else:
        assert found["met"] is None and f"limit of {limit} s" in found["missing"][-1]
        assert found["missing"][-1].startswith("repeat 2: stock, lethe")
        assert [len(number["values"]) for number in found["judged"].values()] == [1] * (samples == 2)


def test_no_repeat_is_begun_that_would_outlast_the_limit(clock):
    two = Two(clock)
    measure(two, Limit(420), lambda _: None)
    assert two.order == ["stock", "lethe"] and clock.now <= 400


def test_a_server_that_fails_gives_no_verdict_and_says_why(clock):
    found = measure(Two(clock, broken=4), Limit(1000), lambda _: None)
    assert found["met"] is None and found["missing"] == ["repeat 2: stock (stock: the server ended with status 1)"]


def test_a_sample_that_is_void_gives_no_verdict(clock, monkeypatch):
    two = Two(clock)
    plain = two.sample
    monkeypatch.setattr(two, "sample", lambda *args: {**plain(*args), "void": "not steady"})
    found = measure(two, Limit(1000), lambda _: None)
    assert found["met"] is None and found["missing"][0] == "repeat 1: stock: not steady"


@pytest.mark.parametrize(
    "bound, values, met",
    [
        (Bound(0.97, "", at_least=True), [0.90, 0.97, 1.0], True),
        (Bound(0.97, "", at_least=True), [0.90, 0.96, 1.0], False),
        (Bound(5, ""), [1, 2, 9], True),
        (Bound(5, "", of_each=True), [1, 2, 9], False),
        (Bound(5, "", of_each=True), [1, 2, 5], True),
        (Bound(3, "", at_least=True, of_each=True), [2, 4, 4], False),
    ],
)
def test_bounds(bound, values, met):
    assert bound.holds(values) is met


def test_a_missed_goal_is_missed(clock):
    found = measure(Two(clock, speeds=[100.0, 90.0, 91.0, 100.0]), Limit(1000), lambda _: None)
    assert found["met"] is False and found["judged"]["of stock's"]["values"] == [0.9, 0.91]


# -- what the goals judge ----------------------------------------------------------------------------------------------


def test_ample_leaves_out_stock_on_lethes_backend_where_it_is_stocks_own():
    ample = GOALS["ample"]
    same = [{"arm": "stock", "backend": "fa3"}, {"arm": "lethe", "backend": "fa3"}]
    other = [same[0], {"arm": "lethe", "backend": "flashinfer"}]
    assert ample.arms(()) == ample.arms(same[:1]) == ample.arms(other) == ["stock", "lethe", "stock-same"]
    assert ample.arms(same) == ["stock", "lethe"]
    assert ample.runs("stock-same", other).endswith("--attention-backend flashinfer")
    assert "--attention-backend" not in ample.runs("stock") + ample.runs("lethe")


def test_ample_is_judged_at_every_length_against_every_stock():
    def at(*speeds):
        return {"at": {str(n): {"tokens_per_s": s} for n, s in zip((1024, 2048, 4096), speeds, strict=True)}}

    found = GOALS["ample"].judged({"stock": at(10, 10, 10), "lethe": at(9, 8, 7), "stock-same": at(20, 20, 20)})
    assert len(found) == 6 and found["4096 tokens, of stock's"] == 0.7 and found["1024 tokens, of stock-same's"] == 0.45


def test_ample_measures_lists_as_long_as_stocks_and_rounds_among_them():
    ample, config = GOALS["ample"], from_mapping(GOALS["ample"].config)
    longest = max(ample.lengths)
    first, last = longest - ample.steps // 2, longest + ample.steps // 2
    assert first < config.budget.tokens + 1 < last - config.rounds.interval, "two rounds at the longest"
    assert sorted(ample.lengths)[-2] + ample.steps < config.budget.tokens
    pool = int(ample.arguments[ample.arguments.index("--max-total-tokens") + 1])
    assert (last + goals.SLACK) * BATCH < pool


@pytest.mark.parametrize("arm", ["stock", "lethe"])
def test_full_sends_a_steady_state(arm):
    full, pool = GOALS["full"], 420_000
    requests = full.requests(arm, pool)
    grown = [(prompt, output) for prompt, output in requests if output < full.output]
    assert requests[len(grown) :] == [(64, full.output)] * (len(requests) - len(grown)) and len(requests) > len(grown)
    ages = [full.output - output for _, output in grown]
    for first in (10, len(ages)):  # any first few are spread evenly
        assert [sum(quarter * 4096 <= age < (quarter + 1) * 4096 for age in ages[:first]) for quarter in range(4)] == (
            pytest.approx([first / 4] * 4, abs=2)
        )
    if arm == "stock":
        assert all(prompt == 64 + age for (prompt, _), age in zip(grown, ages, strict=True))
        assert pool - 17_000 < sum(prompt for prompt, _ in grown) <= pool and 45 <= len(grown) <= 55
    else:
        due = [1024 - prompt for (prompt, _), age in zip(grown, ages, strict=True) if age > 1024]
        assert min(due) == 0 and max(due) == 127 and len(set(due)) > 100, "rounds are due in every step"
        assert 300 <= len(grown) <= 420


def test_full_has_no_verdict_from_a_drift_or_from_a_pool_with_room(monkeypatch):
    full = GOALS["full"]

    def found(steps):
        monkeypatch.setattr(type(full), "loaded", lambda self, *rest: full.window(steps))
        return full.measured(None, "stock", 420_000, lambda: 100.0)

    ramp, steady = [Step(1, 1, 9, 0.5, 0)] * 600, [Step(50, 1, 9, 0.025, 0)] * 599 + [Step(50, 1, 9, 0.025, 2)] * 1
    result = found(ramp + steady * 2)
    assert result["tokens_per_s"] == pytest.approx(2000) and result["void"] is None and len(result["windows"]) == 3
    assert result["prefills"] == 2 and result["steps"] == pytest.approx(600, abs=3)
    assert full.window(ramp + steady[:500]) is None, "three windows of 5 s are 600 steps"
    slower = [*steady[:400], *[Step(50, 1, 9, 0.030, 0)] * 400]
    assert "not steady, -17%" in found(ramp + slower)["void"]
    with pytest.raises(ServerError, match="the pool was not full"):
        found([*ramp, *steady[:100], Step(50, 1, 0, 0.025, 0), *steady])


def test_round_and_stall_judge_the_worse():
    assert GOALS["round"].judged({"lethe": {"device_us": 1, "host_us": 2, "each": {}}}) == {
        "device_us": 1,
        "host_us": 2,
    }
    assert GOALS["stall"].judged(
        {"lethe": {"longest_stalls_ms": [7.0, 1.0]}, "stock": {"longest_stalls_ms": [9.0]}}
    ) == {"longest stall of lethe": 7.0}
    assert GOALS["stall"].bound.of_each


# -- servers -----------------------------------------------------------------------------------------------------------


class Double:
    """A server that decodes what it is sent, in its log, at once."""

    speed, backend, running = 6400.0, "fa3", BATCH

    def __init__(self, command, port, log):
        self.command, self.log, self.evicts, self.rounds = command, log, "--kv-evict" in command, 3
        self.aborted, self.asked, self.ready_seconds, self.bodies = threading.Event(), [], 40.0, []

    def __enter__(self):
        self.log.write_text("up\n" + line() * 500)
        return self

    def __exit__(self, *_):
        self.aborted.set()

    def get(self, path):
        state = {"lethe": {"rounds": self.rounds}} if self.evicts else {}
        return {"internal_states": [state], "max_total_num_tokens": 300_000, "attention_backend": self.backend}

    def post(self, path, body, timeout=600):
        self.asked.append(path)
        if path == "/generate":
            self.bodies.append(body)
            self.rounds += 64
            with self.log.open("a") as log:
                log.write(PREFILL + line(self.running, speed=self.speed) * body["sampling_params"][0]["max_new_tokens"])
            assert self.aborted.wait(10)
        elif path == "/abort_request":
            assert body == {"abort_all": True}
            self.aborted.set()
        else:
            self.aborted.clear()
        return ""


@pytest.fixture
def started(monkeypatch, tmp_path):
    servers = []

    class Started(Double):
        def __enter__(self):
            servers.append(self)
            return super().__enter__()

    monkeypatch.setattr(base, "Server", Started)
    monkeypatch.setattr("lethe_bench.cli.gpu.port_free", lambda port: True)
    monkeypatch.setattr(goals, "write_model", lambda *_: None)
    monkeypatch.setattr(goals, "OUT", tmp_path)
    monkeypatch.setitem(sys.modules, "torch", argparse.Namespace(cuda=argparse.Namespace(is_available=lambda: True)))
    Started.servers = servers
    return Started


def test_a_goal_is_one_command_that_writes_json(started, tmp_path, capsys):
    assert main(["gpu", "goal", "ample", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "goal-ample.json").read_text())
    assert found["met"] is True and found["missing"] == [] and found["command"] == "lethe gpu goal ample"
    assert {"gpus", "machine", "versions", "commit", "date", "settings", "bound", "sizes", "limit_s"} <= set(found)
    assert [(s["repeat"], s["arm"]) for s in found["samples"]] == [
        (1, "stock"),
        (1, "lethe"),
        (2, "lethe"),
        (2, "stock"),
    ]
    assert found["judged"]["1024 tokens, of stock's"]["values"] == [1.0, 1.0] and str(tmp_path) not in str(found)
    assert all(s["at"]["4096"]["steps"] == 224 and s["backend"] == "fa3" for s in found["samples"])
    bodies = started.servers[0].bodies
    assert [{len(prompt) for prompt in body["input_ids"]} for body in bodies] == [{64}, {896}, {1920}, {3968}]
    assert len({tuple(prompt) for prompt in bodies[1]["input_ids"]}) == 64, "prompts of one prefix would share it"
    assert started.servers[0].asked == ["/generate", "/abort_request", "/flush_cache?timeout=30"] * 4
    assert 0 < started.servers[0].ready_within <= 460
    assert capsys.readouterr().out.splitlines()[-1].endswith(": met")


def test_a_server_of_somebody_else_is_not_measured(started, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lethe_bench.cli.gpu.port_free", lambda port: False)
    assert main(["gpu", "goal", "ample", "--out", str(tmp_path / "out")]) == 2 and not started.servers
    assert capsys.readouterr().err.splitlines() == [
        "lethe gpu: error: port 31000 of 127.0.0.1 is in use, and the servers need it; end what listens there"
    ]


def test_a_batch_that_was_never_whole_gives_no_verdict(started, tmp_path, capsys):
    started.running = 63
    threading.Timer(1.0, lambda: [server.aborted.set() for server in started.servers]).start()
    assert main(["gpu", "goal", "stall", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "goal-stall.json").read_text())
    assert found["met"] is None and found["samples"] == [] and "the load was over too early" in found["missing"][0]
    assert capsys.readouterr().out.splitlines()[-1].endswith(": no verdict")


def test_a_stall_of_lethes_misses_the_goal(started, tmp_path, monkeypatch):
    def stalled(steps):
        return [0.0] * 100 + [0.0051]

    monkeypatch.setattr(goals, "stalls", stalled)
    assert main(["gpu", "goal", "stall", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "goal-stall.json").read_text())
    assert found["met"] is False and found["judged"]["longest stall of lethe"]["largest"] == pytest.approx(5.1)
    assert all(s["over_bound"] == 1 and s["rounds"] == (64 if s["arm"] == "lethe" else 0) for s in found["samples"])


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOALS)
def test_a_dry_run_says_what_would_run_for_how_long_and_why(name, capsys, tmp_path):
    assert main(["gpu", "goal", name, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(text.startswith(f"goal {name}") for text in lines) and not (tmp_path / "out").exists()
    goal = GOALS[name]
    assert goal.asks in lines[0] and "limit 480 s" in lines[1] and goal.sizes in lines[2]
    assert goal.repeats * len(goal.arms(())) * goal.arm_seconds + STOPPING_SECONDS < 480, "the estimate fits the limit"
    assert len(lines) == 3 + len(goal.arms(()))
    assert name == "round" or sum("--kv-evict lethe" in text for text in lines) == 1


@pytest.mark.parametrize("arm", ["lethe"])
@pytest.mark.parametrize("name", ["ample", "full", "stall"])
def test_every_goal_runs_uniform_budgets_of_a_legal_configuration(name, arm):
    assert from_mapping(GOALS[name].config).budget.allocation == "uniform"


def test_without_a_gpu_there_is_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    torch = argparse.Namespace(cuda=argparse.Namespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    for name in GOALS:
        assert main(["gpu", "goal", name, "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.splitlines() == [
            "lethe gpu: error: no CUDA device here; nothing was run. --dry-run lists what would run"
        ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["goal"], "goal: give one of ample, full, round, stall"),
        (["bench", "ample"], "ample: lethe gpu bench takes no goal; use lethe gpu goal ample"),
        (["bench", "--limit", "90"], "--limit 90: only lethe gpu goal has a limit; leave it out"),
        (["goal", "full", "--fresh"], "--fresh: a goal is always measured anew; leave it out"),
        (["goal", "full", "--model", "qwen2.5-7b"], "--model qwen2.5-7b: the goals are llama-3.1-8b's; leave it out"),
    ],
)
def test_bad_input_is_one_line_that_names_the_option(words, message, capsys):
    assert main(["gpu", *words]) == 2
    assert capsys.readouterr().err.splitlines() == [f"lethe gpu: error: {message}"]


def test_a_limit_too_short_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["gpu", "goal", "full", "--limit", "5"])
    assert "argument --limit: got 5, expected an integer >= 60" in capsys.readouterr().err
