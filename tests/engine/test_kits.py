"""SGLang's own test kits at a server that evicts say what they say of stock, and lets nobody's reply go on SIGTERM."""

from __future__ import annotations

import threading

import pytest
from conftest import MODEL
from ending import BODY, under_load

from lethe_bench.kits.page import verdict
from lethe_bench.kits.run import outcome
from lethe_bench.kits.table import ARMS, KITS
from lethe_bench.soak.ends import GONE, kill

QUICK = ("api_contract", "kl_short", "radix_tree")
ROUNDS = {"radix_tree"}
"""Kits whose replies are long enough for rounds."""

LIMIT = 60


@pytest.fixture(scope="module")
def arms(start):
    servers = {arm: start(*options) for arm, options in ARMS.items()}
    for server in servers.values():
        server.wait()
    return servers


@pytest.mark.parametrize("name", QUICK)
def test_a_kit_says_of_an_evicting_server_what_it_says_of_stock(name, arms):
    kit = KITS[name]
    found = {
        arm: {case.id().rpartition(".")[2]: outcome(case, server, LIMIT) for case in kit.cases(server, str(MODEL))}
        for arm, server in arms.items()
    }
    assert found["stock"] and all(not outcome["error"] for outcome in found["stock"].values()), found
    words = {test: verdict(kit, test, found["stock"][test], ran) for test, ran in found["evicting"].items()}
    assert {word for word, _ in words.values()} <= {"equal", "by design"}, words
    assert bool(sum(outcome["rounds"] for outcome in found["evicting"].values())) == (name in ROUNDS)
    for server in arms.values():
        server.check_healthy()


def test_sigterm_under_load_ends_all_processes_once_all_have_their_replies(arms, monkeypatch):
    server, replies = arms["evicting"], []
    client = threading.Thread(target=lambda: replies.append(server.post("/generate", BODY)))
    client.start()
    outcome, _ = under_load(server, monkeypatch, lambda: kill(server.pid, "SIGTERM"))
    client.join(10)
    assert outcome == GONE
    meta = replies[0]["meta_info"]
    assert meta["completion_tokens"] == BODY["sampling_params"]["max_new_tokens"] and meta["kv_evict"]["rounds"] > 20
    log = server.log.read_text(errors="replace")
    assert "Traceback" not in log and "Remaining number of requests 0" in log
