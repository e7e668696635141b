"""The page of SGLang's test kits: what it calls two outcomes, and what it says is missing."""

from __future__ import annotations

import json
import unittest

import pytest
from test_docs import script

PASSED, FAILED = ({"error": error, "seconds": 0.1, "rounds": 3} for error in ("", "AssertionError: 1 | 2"))


@pytest.fixture(scope="module")
def kits():
    return script("kits")


@pytest.mark.parametrize(
    "name, stock, evicting, word",
    [
        ("cache_hit_long", PASSED, PASSED, "equal"),
        ("cache_hit_long", FAILED, FAILED, "fails in both"),
        ("cache_hit_long", FAILED, PASSED, "passes only with eviction"),
        ("cache_hit_long", PASSED, FAILED, "by design"),
        ("cache_hit_short", PASSED, FAILED, "FAULT"),
        ("cache_hit_long", PASSED, None, "not compared"),
    ],
)
def test_only_what_eviction_means_to_change_is_by_design(kits, name, stock, evicting, word):
    assert kits.verdict(kits.KITS[name], "test_multiturn_cache_hit", stock, evicting)[0] == word


def test_a_page_counts_faults_and_names_what_has_not_run(kits):
    arms = {"stock": {"api_contract": {"test_a": PASSED}}, "evicting": {"api_contract": {"test_a": FAILED}}}
    found = {"model": "m", "machine": {"cpu": "c"}, "versions": {"sglang": "1"}, "arms": arms}
    page = kits.page(found)
    assert "**1 tests: 1 FAULT.**" in page and "`json_mode`" in page.partition("Not yet run:** ")[2].partition("\n")[0]
    assert "| `api_contract` | `a` | passes | fails | 3 | FAULT |" in page


def test_the_committed_page_is_what_was_found_and_without_a_fault(kits):
    found = json.loads(kits.FOUND.read_text())
    assert kits.PAGE.read_text() == kits.page(found)
    for name, kit in kits.KITS.items():
        stock, evicting = (found["arms"].get(arm, {}).get(name, {}) for arm in kits.ARMS)
        words = {kits.verdict(kit, test, stock.get(test), evicting.get(test))[0] for test in {**stock, **evicting}}
        assert words <= {"equal", "by design", "fails in both"}, name


def test_a_reason_is_one_short_line_that_a_table_can_hold(kits):
    trace = 'Traceback (most recent call last):\n  File "a.py", line 1\nAssertionError: 1 | 2 ' + "x" * 300 + "\nmore"
    [reason] = kits._reasons(trace)
    assert reason.startswith("AssertionError: 1 / 2 x") and len(reason) <= 160 and "\n" not in reason


class Double:
    """A server that has done a round more whenever it is asked."""

    def __init__(self):
        self.rounds, self.posted = 0, []

    def get(self, path):
        self.rounds += 1
        return {"internal_states": [{"lethe": {"rounds": self.rounds}}]}

    def post(self, path, body, timeout):
        self.posted.append(path)


@pytest.mark.parametrize("wrong", [False, True])
def test_an_outcome_has_the_error_and_the_rounds_and_a_failure_leaves_no_pause(kits, wrong):
    class Case(unittest.TestCase):
        def test(self):
            self.assertFalse(wrong)

    server = Double()
    found = kits.outcome(Case("test"), server)
    assert found["error"] == ("AssertionError: True is not false" if wrong else "") and found["rounds"] == 1
    assert server.posted == (["/continue_generation"] if wrong else [])


def test_a_test_that_takes_too_long_has_its_requests_aborted(kits):
    server = Double()
    with kits.limited(server, 0.01):
        for _ in range(500):
            if server.posted:
                break
            kits.time.sleep(0.01)
    assert server.posted == ["/abort_request"]
