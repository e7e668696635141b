"""Part greedy of the GPU suite: what it would run, how passes are compared, resumed and judged. Replies are made up."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from lethe_bench.accuracy.prompts import Prompts
from lethe_bench.gpu import base, greedy, settings
from lethe_bench.gpu.results import Results
from lethe_bench.gpu.settings import CONCURRENCIES, STOCK, Setting, compare, pairs
from lethe_bench.servers import ServerError
from lethe_bench.tasks import tokens_of
from lethe_bench.throughput.plan import Plan
from lethe_sglang.cli.main import main
from lethe_sglang.config import ConfigError, from_mapping

ROOT = Path(__file__).parents[2]
ABOUT = {
    "part": "greedy",
    "command": "lethe gpu greedy",
    "date": "2000-01-01",
    "gpus": ["TEST-GPU"],
    "machine": {},
    "versions": {"torch": "0.0"},
    "commit": "test",
    "planned": ["a", "b", "c", "d", "e"],
}
ARMS = (*STOCK, *STOCK.values())


# -- plan --------------------------------------------------------------------------------------------------------------


def test_each_server_differs_from_its_reference_by_one_flag(capsys):
    assert main(["gpu", "greedy", "--dry-run"]) == 0
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
    assert len(seen) == len(lines) == 2 * 4 * 3 and {arm for _, arm, _ in seen} == set(ARMS)


def test_the_servers_that_tell_most_come_first():
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
    prompts = Prompts(str(ROOT / settings.MODEL))
    for item in settings.problems():
        assert 0 < len(prompts.encode(item.prompt)) - len(tokens_of(item.prompt)) < 8
        assert item.grade(item.reference) and item.grade((item.reference + "<eos>").removesuffix(prompts.end))
        assert not item.grade("</think>?")


# -- comparison --------------------------------------------------------------------------------------------------------


def answers(differing=0, count=100):
    """A pass whose last replies differ from those of a pass without ``differing``."""
    return {
        "replies": [f"{i:012x}" for i in range(count - differing)] + [f"{i:012d}x" for i in range(differing)],
        "tokens": 100 * count,
        "right": 7,
        "rounds": 3,
        "running_peak": 5,
        "retracted_requests": 0,
        "seconds": 1.0,
    }


def servers(mode, arm, **differing):
    """All servers of an arm; ``no_graphs_40=3``: that many replies of that pass differ from those of all others."""
    found = {}
    for variant in settings.VARIANTS:
        wrong = {n: differing.pop(f"{variant.replace('-', '_')}_{n}", 0) for n in CONCURRENCIES}
        passes = {str(n): answers(count) for n, count in wrong.items()}
        found[Setting(mode, arm, variant).name] = {"status": "measured", "passes": passes}
    assert not differing
    return found


def test_equal_pairs_mean_equal_passes():
    found = pairs("ordinary", "stock-triton")
    assert len(found) == 8
    default = Setting("ordinary", "stock-triton")
    reached = {(default, 1)}
    for _ in found:
        reached |= {key for pair in found for key in (pair.one, pair.other) if {pair.one, pair.other} & reached}
    assert reached == {(default._replace(variant=v), n) for v in settings.VARIANTS for n in CONCURRENCIES}


def test_replies_are_compared_one_by_one():
    records = servers("ordinary", "lethe-triton", no_graphs_40=3, default_100=2, no_overlap_1=100)
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


def test_what_was_not_measured_is_not_compared():
    records = servers("ordinary", "lethe-triton")
    records[Setting("ordinary", "lethe-triton", "no-graphs").name] = {"status": "failed", "message": "test"}
    labels = [c.pair.label for c in compare(records, "ordinary", "lethe-triton")]
    assert labels == [*(f"with and without overlap, at {n}" for n in (1, 40, 100)), "at 1 and at 40", "at 1 and at 100"]
    del records[Setting("ordinary", "lethe-triton", "no-overlap").name]
    assert len(compare(records, "ordinary", "lethe-triton")) == 2


def test_passes_of_different_problems_are_not_compared():
    records = servers("ordinary", "lethe-triton")
    records[Setting("ordinary", "lethe-triton").name]["passes"]["40"] = answers(count=99)
    with pytest.raises(ValueError, match="zip"):
        compare(records, "ordinary", "lethe-triton")


# -- report ------------------------------------------------------------------------------------------------------------


def test_the_report_has_lethe_beside_stock(tmp_path):
    records = servers("ordinary", "lethe-triton", no_graphs_40=3) | servers("ordinary", "stock-triton", no_graphs_40=5)
    records["deterministic lethe-triton default"] = {"status": "refused", "message": "a | reason"}
    results = Results(tmp_path / "greedy.jsonl", ABOUT)
    for key, record in records.items():
        results.add(key, record)
    assert main(["gpu", "report", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "| replies that differ | lethe-flashinfer | lethe-triton | stock-flashinfer | stock-triton |" in lines
    assert "| ordinary: with and without graphs, at 40 | - | 3 of 100 | - | 5 of 100 |" in lines
    assert "| deterministic: at 1 and at 40 | - | - | - | - |" in lines
    assert "| ordinary lethe-triton default at 1 | 100 | 7 | 100 | 5 | 0 | 3 | 1.0 |" in lines
    assert "| deterministic lethe-triton default | refused: a / reason | | | | | | |" in lines


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


@pytest.fixture
def asked(monkeypatch):
    """Ten problems, every second reply right; returns their prompts."""
    items = [SimpleNamespace(prompt=[i, i + 1], grade=lambda text: int(text) % 2 == 0, reference="") for i in range(10)]
    monkeypatch.setattr(greedy, "problems", lambda: items)
    monkeypatch.setattr(greedy, "Prompts", lambda path: PROMPTS)
    return [item.prompt for item in items]


PROMPTS = SimpleNamespace(encode=lambda prompt: prompt, end="<eos>")


@pytest.fixture
def double(tmp_path, asked):
    with Double(["--kv-evict"], 1, tmp_path / "log") as server:
        yield server


@pytest.mark.parametrize("concurrency", [1, 4, 10])
def test_replies_come_back_in_the_order_of_the_problems(double, concurrency):
    double.wanted = concurrency
    found = greedy.ask_all(double, True, concurrency, PROMPTS)
    assert found["replies"] == [greedy.digest([i + 1, i]) for i in range(10)]
    assert double.most == concurrency == found["running_peak"], "not as many requests at once as asked for"
    assert (found["tokens"], found["right"], found["rounds"], found["retracted_requests"]) == (20, 5, 30, 0)
    assert double.calls[0] == "/flush_cache" and double.calls.count("/generate") == 10


def test_a_digest_tells_replies_apart():
    others = ([1, 2, 3], [1, 2], [1, 23], [12, 3], [1, 2, 4])
    assert len({greedy.digest(ids) for ids in others}) == len(others)


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
    with pytest.raises(ServerError, match=message):
        greedy.ask_all(double, evicts, 2, PROMPTS)


@pytest.fixture
def suite(monkeypatch, tmp_path, asked):
    """The part on doubles: two servers of the plan, ten problems; ``started`` has the doubles."""
    started, plan = [], [Setting("deterministic", "lethe-triton"), Setting("ordinary", "stock-triton")]

    class Started(Double):
        def __enter__(self):
            started.append(self)
            for change in changes:
                change(self)
            return super().__enter__()

    changes = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(base, "Server", Started)
    monkeypatch.setattr(greedy, "settings", lambda: plan)
    return SimpleNamespace(
        started=started,
        changes=changes,
        keys=[setting.name for setting in plan],
        results=lambda: Results(tmp_path / "greedy.jsonl", ABOUT),
    )


def test_a_server_answers_all_its_passes_and_is_ended(suite):
    found = suite.results()
    greedy.Greedy().work(found)
    assert list(found.records) == suite.keys
    assert [server.calls.count("/generate") for server in suite.started] == [30, 30]
    assert all(server.calls[-1] == "stop" for server in suite.started)
    for record in found.records.values():
        assert record["status"] == "measured" and list(record["passes"]) == ["100", "40", "1"]
        assert all(p["replies"] == [greedy.digest([i + 1, i]) for i in range(10)] for p in record["passes"].values())
    one = found.records["deterministic lethe-triton default"]
    alone = one["passes"]["1"]
    assert (alone["tokens"], alone["right"], alone["rounds"], alone["running_peak"]) == (20, 5, 30, 1)
    assert "--kv-evict" in one["runs"] and str(ROOT) not in one["runs"]


def test_a_part_goes_on_where_it_was_left(suite, monkeypatch):
    ask_all = greedy.ask_all

    def killed(server, evicts, n, prompts):
        if not evicts and n == 1:
            raise KeyboardInterrupt
        return ask_all(server, evicts, n, prompts)

    monkeypatch.setattr(greedy, "ask_all", killed)
    with pytest.raises(KeyboardInterrupt):
        greedy.Greedy().work(suite.results())
    assert suite.started[1].calls[-1] == "stop"
    monkeypatch.setattr(greedy, "ask_all", ask_all)
    again = suite.results()
    assert list(again.records) == suite.keys[:1]
    greedy.Greedy().work(again)
    assert list(again.records) == suite.keys and len(suite.started) == 3
    greedy.Greedy().work(suite.results())
    assert len(suite.started) == 3, "a server was started although nothing is left"


@pytest.mark.parametrize(
    "error, status, message",
    [
        (ServerError("the server ended with status 2:\nlethe: error: no such backend\n"), "refused", "no such"),
        (ServerError("the server ended with status 1:\nno space"), "failed", "no space"),
        (ConnectionResetError("reset"), "failed", "the server is gone"),
    ],
)
def test_a_server_that_fails_is_recorded_and_the_next_one_runs(suite, error, status, message):
    def fail(server):
        if server.evicts:
            raise error

    suite.changes.append(fail)
    found = suite.results()
    greedy.Greedy().work(found)
    assert len(suite.started) == 2
    assert [found.records[key]["status"] for key in suite.keys] == [status, "measured"]
    assert message in found.records[suite.keys[0]]["message"]


def test_outside_a_checkout_it_says_what_is_missing(suite, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"needs models/reasoner of a checkout of this project; run it there"):
        greedy.Greedy().work(suite.results())
    assert suite.started == []
