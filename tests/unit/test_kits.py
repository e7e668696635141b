"""SGLang's test kits: what their page calls two outcomes and says is missing, and how they are run."""

from __future__ import annotations

import json
import threading
import unittest
from pathlib import Path

import pytest
from test_docs import script

from lethe_bench.kits import run
from lethe_bench.kits.page import compared, page, verdict
from lethe_bench.kits.table import KITS, Kit

PASSED, FAILED = ({"error": error, "seconds": 0.1, "rounds": 3} for error in ("", "AssertionError: 1 | 2"))


@pytest.fixture(scope="module")
def kits():
    return script("kits")


@pytest.mark.parametrize(
    "name, stock, evicting, word",
    [
        ("cache_hit_long", PASSED, PASSED, "equal"),
        ("cache_hit_long", FAILED, FAILED, "fails in both"),
        ("cache_hit_long", FAILED, PASSED, "by design"),
        ("cache_hit_short", FAILED, PASSED, "passes only with eviction"),
        ("cache_hit_long", PASSED, FAILED, "by design"),
        ("cache_hit_short", PASSED, FAILED, "FAULT"),
        ("cache_hit_long", PASSED, None, "not compared"),
    ],
)
def test_only_what_eviction_means_to_change_is_by_design(name, stock, evicting, word):
    assert verdict(KITS[name], "test_multiturn_cache_hit", stock, evicting)[0] == word


def test_a_page_counts_faults_and_names_what_has_not_run():
    arms = {"stock": {"test_a": PASSED}, "evicting": {"test_a": FAILED}}
    kits = {"api_contract": {"model": "models/m", **arms}, "pause": {"model": "m", "stock": {"test_b": PASSED}}}
    text = page({"machine": {"cpu": "c"}, "versions": {"sglang": "1"}, "kits": kits})
    assert "**2 tests: 1 FAULT, 1 not compared.**" in text
    missing = text.partition("Not yet run:** ")[2].partition("\n")[0]
    assert "`json_mode`" in missing and "`pause`" in missing and "`api_contract`" not in missing
    assert "| `api_contract` | `a` | m | passes | fails | 3 | FAULT |" in text


def test_the_committed_page_is_what_was_found_and_without_a_fault(kits):
    found = json.loads(kits.FOUND.read_text())
    assert kits.PAGE.read_text() == page(found)
    for name, kit in KITS.items():
        words = {verdict(kit, test, *pair)[0] for test, pair in compared(found, name).items()}
        assert words <= {"equal", "by design", "fails in both"}, name


def test_a_run_of_some_leaves_the_others_and_another_model_replaces(kits, tmp_path, monkeypatch):
    monkeypatch.setattr(kits, "FOUND", tmp_path / "kits" / "kits.json")
    monkeypatch.setattr(kits, "PAGE", tmp_path / "kits.md")
    kits.write({"pause": {"model": "m", "stock": {"test_b": PASSED}}})
    kits.write({"api_contract": {"model": "m", "stock": {"test_a": PASSED}}})
    kits.write({"api_contract": {"model": "m", "evicting": {"test_a": PASSED}}})
    found = json.loads(kits.FOUND.read_text())["kits"]
    assert list(found) == ["pause", "api_contract"] and list(found["api_contract"]) == ["model", "stock", "evicting"]
    assert "| `a` | m | passes | passes | 3 | equal |" in kits.PAGE.read_text()
    kits.write({"api_contract": {"model": "another", "stock": {"test_a": FAILED}}})
    assert list(json.loads(kits.FOUND.read_text())["kits"]["api_contract"]) == ["model", "stock"]


def test_a_reason_is_one_short_line_that_a_table_can_hold():
    trace = 'Traceback (most recent call last):\n  File "a.py", line 1\nAssertionError: 1 | 2 ' + "x" * 300 + "\nmore"
    reason = run.reason(trace)
    assert reason.startswith("AssertionError: 1 / 2 x") and len(reason) <= 160 and "\n" not in reason
    here = Path(__file__).parent
    assert run.reason(f"AssertionError: no {here} at /v1/x") == "AssertionError: no unit at /v1/x"


class Double:
    """A server that has done a round more whenever it is asked."""

    url, status = "http://127.0.0.1:1", None

    def __init__(self):
        self.rounds, self.posted = 0, []

    def get(self, path, timeout):
        self.rounds += 1
        return {"internal_states": [{"lethe": {"rounds": self.rounds}}]}

    def post(self, path, body, timeout):
        self.posted.append(path)


@pytest.mark.parametrize("wrong", [False, True])
def test_an_outcome_has_the_error_and_the_rounds_and_a_failure_leaves_no_pause(wrong):
    class Case(unittest.TestCase):
        def test(self):
            self.assertFalse(wrong)

    server = Double()
    found = run.outcome(Case("test"), server, 60)
    assert found["error"] == ("AssertionError: True is not false" if wrong else "") and found["rounds"] == 1
    assert server.posted == (["/continue_generation"] if wrong else [])


def test_a_test_that_takes_too_long_has_its_requests_aborted():
    server, aborted = Double(), threading.Event()
    server.post = lambda *what, **more: aborted.set()
    with run.limited(server, 0.01):
        assert aborted.wait(5)


class Planted(Kit):
    """A kit of tests that are here."""

    def cases(self, server, model):
        return [case(name) for case in (self.mixin,) for name in unittest.TestLoader().getTestCaseNames(case)]


def test_what_may_runs_at_once_and_the_others_alone(monkeypatch):
    both, running = threading.Barrier(2, timeout=30), []

    class Together(unittest.TestCase):
        def test_a(self):
            both.wait()

        test_b = test_a

    class Alone(unittest.TestCase):
        def test_a(self):
            running.append(threading.active_count())

    monkeypatch.setattr(
        run, "KITS", {"alone": Planted("", Alone, alone=True), "one": Planted("", Together), "gone": Planted("", Alone)}
    )
    found = {}
    run.run(["alone", "one"], Double(), "model", lambda name, test, outcome: found.update({(name, test): outcome}))
    assert list(found)[-1] == ("alone", "test_a") and len(found) == 3
    assert [outcome["error"] for outcome in found.values()] == ["", "", ""]
    server = Double()
    server.status = 1
    with pytest.raises(SystemExit, match=r"the server ended in .*Alone\.test_a"):
        run.run(["alone"], server, "model", lambda *what: None)
    with pytest.raises(SystemExit, match="the server ended while"):
        run.run(["gone"], server, "model", lambda *what: None)
