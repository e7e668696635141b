"""Part greedy of the GPU suite: what it would run, how passes are compared, resumed and judged. Replies are made up."""

import argparse
import json
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

from gpu_suite import greedy, replies, settings
from gpu_suite.__main__ import main
from gpu_suite.goals import GOALS, replies_more_than_stock, replies_that_differ
from gpu_suite.replies import Asked
from gpu_suite.results import Results
from gpu_suite.settings import CONCURRENCIES, STOCK, Setting, compare, pairs

from lethe_sglang.config import from_mapping
from lethe_sglang.evaluation import servers
from lethe_sglang.evaluation.bench_plan import Plan
from lethe_sglang.evaluation.tasks import tokens_of

ROOT = Path(__file__).parents[2]
ABOUT = {
    "part": "greedy",
    "model": None,
    "command": "bash scripts/gpu_suite.sh greedy",
    "date": "2000-01-01",
    "gpus": ["TEST-GPU"],
    "machine": {},
    "versions": {"torch": "0.0"},
    "commit": "test",
}
ARMS = (*STOCK, *STOCK.values())


# -- plan --------------------------------------------------------------------------------------------------------------


def test_each_server_differs_from_its_reference_by_one_flag(capsys):
    assert main(["greedy", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    flags = {
        "--enable-deterministic-inference": "deterministic",
        "--disable-cuda-graph": "no-graphs",
        "--disable-overlap-schedule": "no-overlap",
    }
    seen = set()
    for line in lines:
        (_, mode, arm, variant, *_), command = line.split(": ", 1)[0].split(), line.split(": ", 1)[1].split()
        seen.add((mode, arm, variant))
        policy, backend = arm.split("-")
        assert command[command.index("--attention-backend") + 1] == backend
        assert [flag for flag in flags if flag in command] == [
            f for f, name in flags.items() if name in (mode, variant)
        ]
        assert ("--kv-evict" in command) == (policy == "lethe") and str(ROOT) not in line
        assert "at 100, 40, 1, 100 replies each" in line
    assert len(seen) == len(lines) == 2 * 4 * 3 and {arm for _, arm, _ in seen} == set(ARMS)


def test_the_servers_that_the_goals_need_come_first():
    order = [(s.mode, s.arm) for s in settings.settings() if s.variant == "default"]
    assert order[:2] == [("deterministic", "lethe-flashinfer"), ("deterministic", "lethe-triton")]
    assert {arm for _, arm in order[6:]} == set(STOCK.values()) and {mode for mode, _ in order[6:]} == {"deterministic"}


def test_the_same_hundred_problems_are_asked_each_time():
    items = settings.problems()
    assert [item.prompt for item in items] == [item.prompt for item in settings.problems()]
    assert len({item.id for item in items}) == 100 == len({item.prompt for item in items})
    lengths = [len(tokens_of(item.reference)) for item in items]
    assert min(lengths) > 190 and max(lengths) < settings.LONGEST
    pool = int(settings.COMMON[settings.COMMON.index("--max-total-tokens") + 1])
    assert sum(len(tokens_of(item.prompt)) + 8 + settings.LONGEST for item in items) < pool


def test_the_budget_evicts_several_times_in_the_shortest_reply():
    config = from_mapping(settings.EVICTION | {"policy": "lethe"}, where="test")
    first = Plan(model_path="model", config=config).first_round
    assert (190 - first) // config.rounds.interval >= 5


def test_prompts_are_the_models_and_replies_are_marked():
    asked, items = replies.questions(), settings.problems()
    for one, item in zip(asked, items, strict=True):
        assert 0 < len(one.prompt) - len(tokens_of(item.prompt)) < 8
        assert one.right(item.reference) and one.right(item.reference + "<eos>") and not one.right("</think>?")


# -- comparison --------------------------------------------------------------------------------------------------------


def answers(differing=0, count=100):
    """A pass whose last replies differ from those of a pass without ``differing``."""
    digests = [f"{i:012x}" for i in range(count - differing)] + [f"{i:012d}x" for i in range(differing)]
    return {
        "status": "measured",
        "replies": " ".join(digests),
        "tokens": 100 * count,
        "right": 7,
        "rounds": 3,
        "running_peak": 5,
        "retracted_requests": 0,
        "seconds": 1.0,
    }


def passes(mode, arm, **differing):
    """All passes of an arm; ``no_graphs_40=3``: that many replies of that pass differ from those of all others."""
    found = {}
    for variant in settings.VARIANTS:
        for n in CONCURRENCIES:
            wrong = differing.pop(f"{variant.replace('-', '_')}_{n}", 0)
            found[Setting(mode, arm, variant).key(n)] = answers(wrong)
    assert not differing
    return found


def test_equal_pairs_mean_equal_passes():
    found = pairs("ordinary", "stock-triton")
    assert [pair.kind for pair in found] == ["graphs"] * 3 + ["overlap"] * 3 + ["concurrency"] * 2
    reached = {Setting("ordinary", "stock-triton").key(1)}
    for _ in found:
        reached |= {key for pair in found for key in (pair.one, pair.other) if {pair.one, pair.other} & reached}
    assert reached == set(passes("ordinary", "stock-triton"))


def test_replies_are_compared_one_by_one():
    records = passes("ordinary", "lethe-triton", no_graphs_40=3, default_100=2, no_overlap_1=100)
    found = {c.pair.label: (c.differ, c.of) for c in compare(records, "ordinary", "lethe-triton")}
    assert found == {
        "with and without graphs, at 1": (0, 100),
        "with and without graphs, at 40": (3, 100),
        "with and without graphs, at 100": (2, 100),
        "with and without overlap, at 1": (100, 100),
        "with and without overlap, at 40": (0, 100),
        "with and without overlap, at 100": (2, 100),
        "at 1 and at 40": (0, 100),
        "at 1 and at 100": (2, 100),
    }
    assert compare(records, "deterministic", "lethe-triton") == compare(records, "ordinary", "lethe-flashinfer") == []


def test_what_was_not_measured_in_full_is_not_compared():
    records = passes("ordinary", "lethe-triton")
    records[Setting("ordinary", "lethe-triton").key(40)] = {"status": "failed", "message": "test"}
    records[Setting("ordinary", "lethe-triton", "no-graphs").key(1)]["status"] = "partial"
    del records[Setting("ordinary", "lethe-triton", "no-overlap").key(100)]
    labels = [c.pair.label for c in compare(records, "ordinary", "lethe-triton")]
    assert labels == ["with and without graphs, at 100", "with and without overlap, at 1", "at 1 and at 100"]


def test_passes_of_different_problems_are_not_compared():
    records = passes("ordinary", "lethe-triton")
    records[Setting("ordinary", "lethe-triton").key(40)] = answers(count=99)
    with pytest.raises(ValueError, match="zip"):
        compare(records, "ordinary", "lethe-triton")


# -- goals and report --------------------------------------------------------------------------------------------------


def test_the_goal_of_the_deterministic_mode_is_no_difference_in_any_pair():
    goal = next(goal for goal in GOALS if goal.values is replies_that_differ)
    records = passes("deterministic", "lethe-flashinfer")
    assert goal.mark({"greedy": records}).startswith("not yet run on a GPU in full: 8 of 16 points; worst 0 replies")
    records |= passes("deterministic", "stock-triton", default_40=50)  # is only looked at
    equal = records | passes("deterministic", "lethe-triton")
    assert goal.mark({"greedy": equal}).startswith("met: worst 0 replies differ")
    one = records | passes("deterministic", "lethe-triton", no_overlap_40=1)
    missed = "missed: worst 1 replies differ (lethe-triton with and without overlap, at 40); 15 of 16 points meet it"
    assert goal.mark({"greedy": one}) == missed


def test_the_goal_without_that_mode_is_no_more_differences_than_stocks_of_a_kind():
    goal = next(goal for goal in GOALS if goal.values is replies_more_than_stock)
    records = passes("ordinary", "lethe-flashinfer", no_graphs_1=4) | passes("ordinary", "lethe-triton", no_graphs_1=4)
    assert goal.mark({"greedy": records}) == "not yet run on a GPU"
    records |= passes("ordinary", "stock-flashinfer", no_graphs_100=4)  # another pair, the same kind
    few = records | passes("ordinary", "stock-triton", no_graphs_1=3, no_overlap_1=9)
    assert dict(replies_more_than_stock({"greedy": few})) == {
        "lethe-flashinfer, graphs": 0,
        "lethe-flashinfer, overlap": 0,
        "lethe-flashinfer, concurrency": 0,
        "lethe-triton, graphs": 1,
        "lethe-triton, overlap": -9,
        "lethe-triton, concurrency": 0,
    }
    assert goal.mark({"greedy": few}) == "missed: worst 1 more than stock (lethe-triton, graphs); 5 of 6 points meet it"
    enough = records | passes("ordinary", "stock-triton", no_graphs_1=4)
    assert goal.mark({"greedy": enough}).startswith("met: worst 0 more than stock")
    del enough[Setting("ordinary", "stock-triton", "no-graphs").key(40)]  # a kind counts only as a whole
    assert goal.mark({"greedy": enough}).startswith("not yet run on a GPU in full: 5 of 6 points")


def test_the_report_has_lethe_beside_stock(tmp_path):
    records = passes("ordinary", "lethe-triton", no_graphs_40=3) | passes("ordinary", "stock-triton", no_graphs_40=5)
    records["deterministic lethe-triton default at 1"] = {"status": "partial", "message": "50 of 100 replies"}
    records["deterministic lethe-triton default at 40"] = {"status": "refused", "message": "refused: a | reason"}
    body = {**ABOUT, "planned": list(records), "finished": False, "records": records}
    (tmp_path / "greedy.json").write_text(json.dumps(body))
    assert main(["report", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "| replies that differ | lethe-flashinfer | lethe-triton | stock-flashinfer | stock-triton |" in lines
    assert "| ordinary: with and without graphs, at 40 | - | 3 of 100 | - | 5 of 100 |" in lines
    assert "| deterministic: at 1 and at 40 | - | - | - | - |" in lines
    assert "| ordinary lethe-triton default at 1 | 100 | 7 | 100 | 5 | 0 | 3 | 1.0 |" in lines
    assert "| deterministic lethe-triton default at 1 | partial: 50 of 100 replies | | | | | | |" in lines
    assert "| deterministic lethe-triton default at 40 | refused: a / reason | | | | | | |" in lines


# -- passes ------------------------------------------------------------------------------------------------------------


class Double:
    """A server whose replies are the prompts backwards; each runs three rounds, and waits until ``wanted`` are open."""

    def __init__(self, command, port, log):
        self.command, self.port, self.log, self.rounds = command, port, log, 0
        self.evicts, self.three, self.finish, self.wanted = "--kv-evict" in command, 3, "stop", 1
        self.calls, self.open, self.most, self.changed = [], 0, 0, threading.Condition()

    def __enter__(self):
        self.log.write_text("a line before\nDecode batch, #running-req: 99, #token: 1\n")
        return self

    def __exit__(self, *_):
        self.calls.append("stop")

    def get(self, path):
        return {"internal_states": [{"lethe": {"rounds": self.rounds}} if self.evicts else {}]}

    def post(self, path, body):
        self.calls.append(path.partition("?")[0])
        return self.generate(**body) if path == "/generate" else ""

    def generate(self, input_ids, sampling_params):
        assert sampling_params["temperature"] == 0
        with self.changed, self.log.open("a") as log:
            self.open += 1
            self.most = max(self.most, self.open)
            self.rounds += self.three
            log.write(f"Decode batch, #running-req: {self.open}, #token: 9\n")
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.most >= self.wanted, timeout=5)
            self.open -= 1
        ids, meta = input_ids[::-1], {"finish_reason": {"type": self.finish}}
        return json.dumps({"text": str(ids[0]), "output_ids": ids, "meta_info": meta})


ASKED = [Asked([i, i + 1], lambda text: int(text) % 2 == 0) for i in range(10)]


@pytest.fixture
def double(tmp_path):
    with Double(["--kv-evict"], 1, tmp_path / "log") as server:
        yield server


@pytest.mark.parametrize("concurrency", [1, 4, 10])
def test_replies_come_back_in_the_order_of_the_problems(double, concurrency):
    double.wanted = concurrency
    found = replies.ask_all(double, True, concurrency, ASKED)
    assert found["replies"].split() == [replies.digest([i + 1, i]) for i in range(10)]
    assert double.most == concurrency == found["running_peak"], "not as many requests at once as asked for"
    assert (found["tokens"], found["right"], found["rounds"], found["retracted_requests"]) == (20, 5, 30, 0)
    assert double.calls[0] == "/flush_cache" and double.calls.count("/generate") == 10


def test_a_digest_tells_replies_apart():
    others = ([1, 2, 3], [1, 2], [1, 23], [12, 3], [1, 2, 4])
    assert len({replies.digest(ids) for ids in others}) == len(others)


@pytest.mark.parametrize(
    "change, evicts, message",
    [
        ({"three": 0}, True, "no round was run"),
        ({"evicts": False}, True, "does not report eviction"),
        ({}, False, "the server evicts"),
        ({"finish": "abort"}, True, "gave 10 replies up"),
    ],
)
def test_a_pass_that_is_not_what_it_should_be_fails(double, change, evicts, message):
    vars(double).update(change)
    with pytest.raises(servers.ServerError, match=message):
        replies.ask_all(double, evicts, 2, ASKED)


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """The part on doubles: two servers of the plan, ten problems, in pieces of four; ``started`` has the doubles."""
    started, plan = [], [Setting("deterministic", "lethe-triton"), Setting("ordinary", "stock-triton")]

    class Started(Double):
        def __enter__(self):
            started.append(self)
            for change in changes:
                change(self)
            return super().__enter__()

    changes = []
    monkeypatch.setattr(servers, "Server", Started)
    monkeypatch.setattr(greedy, "questions", lambda: ASKED)
    monkeypatch.setattr(greedy, "settings", lambda: plan)
    monkeypatch.setattr(greedy, "PIECE", 4)
    keys = [setting.key(n) for setting in plan for n in CONCURRENCIES]
    return argparse.Namespace(
        started=started, changes=changes, keys=keys, results=lambda: Results(tmp_path / "greedy.json", ABOUT, keys)
    )


def test_a_server_answers_all_its_passes_and_is_ended(suite):
    found = suite.results()
    greedy.run(found, time.monotonic() + 500)
    assert found.todo() == [] and list(found.records) == suite.keys
    assert [server.calls.count("/generate") for server in suite.started] == [30, 30]
    assert all(server.calls[-1] == "stop" for server in suite.started)
    assert {record["status"] for record in found.records.values()} == {"measured"}
    digests = {record["replies"] for record in found.records.values()}
    assert digests == {" ".join(replies.digest([i + 1, i]) for i in range(10))}
    alone = found.records["deterministic lethe-triton default at 1"]
    assert (alone["tokens"], alone["right"], alone["rounds"], alone["running_peak"]) == (20, 5, 30, 1)
    assert "--kv-evict" in alone["command"] and str(ROOT) not in alone["command"]


def test_a_pass_goes_on_where_it_was_left(suite, monkeypatch):
    found, begun = suite.results(), []

    def killed(server, evicts, n, asked):
        if n == 1 and len(begun) == 2:
            raise KeyboardInterrupt
        begun.extend([asked] if n == 1 else [])
        return replies.ask_all(server, evicts, n, asked)

    monkeypatch.setattr(greedy, "ask_all", killed)
    with pytest.raises(KeyboardInterrupt):
        greedy.run(found, time.monotonic() + 500)
    assert suite.started[0].calls[-1] == "stop"
    monkeypatch.setattr(greedy, "ask_all", replies.ask_all)
    again = suite.results()
    key = "deterministic lethe-triton default at 1"
    assert again.todo() == suite.keys[2:] and again.records[key]["message"] == "8 of 10 replies"
    greedy.run(again, time.monotonic() + 500)
    assert again.todo() == [] and suite.started[1].calls.count("/generate") == 2
    assert again.records[key]["replies"] == again.records[suite.keys[0]]["replies"]
    assert again.records[key]["rounds"] == 30 and again.records[key]["status"] == "measured"
    greedy.run(again, time.monotonic() + 500)
    assert len(suite.started) == 3, "a server was started although nothing is left"


@pytest.mark.parametrize(
    "error, status, message",
    [
        (servers.ServerError("the server ended with status 2:\nlethe: error: no such backend\n"), "refused", "no such"),
        (servers.ServerError("the server ended with status 1:\nno space"), "failed", "no space"),
        (ConnectionResetError("reset"), "failed", "the server is gone"),
    ],
)
def test_a_server_that_fails_is_recorded_and_the_next_one_runs(suite, error, status, message):
    def fail(server):
        if server.evicts:
            raise error

    suite.changes.append(fail)
    found = suite.results()
    greedy.run(found, time.monotonic() + 500)
    assert found.todo() == [] and len(suite.started) == 2
    states = [found.records[key]["status"] for key in suite.keys]
    assert states == [status] * 3 + ["measured"] * 3
    assert message in found.records[suite.keys[0]]["message"]


def test_a_server_that_outlasts_the_slot_is_recorded_only_if_it_had_all_of_it(suite, monkeypatch):
    suite.changes.append(lambda server: time.sleep(0 if server.evicts else 5))
    monkeypatch.setattr(greedy, "LEAST_SECONDS", 0)
    found, started = suite.results(), time.monotonic()
    greedy.run(found, started + 2)
    assert found.todo() == suite.keys[3:] and time.monotonic() - started < 4
    again = suite.results()
    greedy.run(again, time.monotonic() + 1.5)
    assert again.todo() == suite.keys[4:] and again.records[suite.keys[3]]["status"] == "unfinished"
    assert len(suite.started) == 3, "a server was started although nothing of it is left"


def test_a_server_is_not_begun_with_little_time_left(suite):
    found = suite.results()
    greedy.run(found, time.monotonic() + greedy.LEAST_SECONDS - 10)
    assert len(suite.started) == 1 and found.todo() == suite.keys[3:]
