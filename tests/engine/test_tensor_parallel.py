"""Two ranks on a CPU keep the same cells, in SGLang's deterministic mode; prompts are private."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from conftest import config
from problems import PROMPTS, prompt, walk


@pytest.fixture(scope="module", params=[1, 16])
def server(start, request):
    """Two ranks, by the page size."""
    settings = config(
        budget={"tokens": 48},
        rounds={"interval": 16},
        lethe={"half_life": 7, "score_every": 3},
        retain={"prompt": "evict"},
        debug={"kept_hash": True, "shadow": True},
        monitor={"fraction": 1.0},
    )
    server = start(
        "--tp",
        "2",
        "--max-total-tokens",
        "1280",
        "--page-size",
        str(request.param),
        "--kv-evict",
        "lethe",
        "--kv-evict-config",
        settings,
        "--enable-deterministic-inference",
        "--attention-backend",
        "torch_native",
        env={"PYTHONPATH": str(Path(__file__).parent / "deterministic_on_cpu")},
    ).wait()
    yield server
    server.check_healthy()
    server.stop()


@pytest.mark.proves("tensor parallelism")
def test_both_ranks_keep_the_same_cells(server):
    assert server.get("/server_info")["enable_deterministic_inference"] is True
    problem, answer = walk(3, steps=24)
    assert server.generate(prompt(problem), tokens=150, kv_evict="none")["text"] == answer
    server.generate_all(PROMPTS[:4], 4, tokens=100)
    server.check_healthy()
    assert agreed(server) > 8


@pytest.mark.parametrize("server", [1], indirect=True)
def test_both_ranks_prefill_the_same_requests_again(server):
    """Rank 0 says when; a rank that did otherwise would hang in the next collective, or fail its memory checks."""
    before = server.lethe()["quality"]["probes"]
    server.generate_all(PROMPTS[4:6], 2, tokens=100, ignore_eos=True)
    deadline = time.monotonic() + 60
    while server.lethe()["quality"]["probes"] < before + 2:
        assert time.monotonic() < deadline, server.lethe()["quality"]
        time.sleep(0.05)
    server.check_healthy()
    quality = server.lethe()["quality"]
    assert set(quality["skipped"]) <= {"stale"}, quality  # the flushes of other tests
    groups = {(group["reason"], group["steps"]): group for group in quality["groups"]}
    assert groups[("none", "none")]["k3"] < 1e-5 and groups[("interval", "0-15")]["tokens"] > 50


def agreed(server):
    """Compare what the ranks kept in every round, and count the rounds."""
    log = server.log.read_text(errors="replace")
    by_round = {}
    for rank, number, digest in re.findall(r"TP(\d)\] KV eviction: kept-set hash (\d+) ([0-9a-f]+)", log):
        by_round.setdefault(int(number), {})[int(rank)] = digest
    for number, digests in by_round.items():
        assert set(digests) == {0, 1} and digests[0] == digests[1], f"round {number}: {digests}"
    return len(by_round)


@pytest.mark.parametrize("server", [1], indirect=True)
def test_a_private_prompt_longer_than_the_budget_is_pruned(server):
    server.flush()
    problem, _ = walk(5, nodes=20, steps=40)
    server.generate(prompt(problem), tokens=60)
    last = server.lethe()["last_finished"]
    assert last["held_peak"] >= len(problem) > 80, "the prompt is intact first"
    assert min(last["evicted_per_layer"]) >= len(problem) + 60 - 48 - 16 - 2
    replay = server.generate(prompt(problem), tokens=1)
    assert replay["meta"]["cached_tokens"] == 0, "a private prompt seeded the tree"


@pytest.mark.proves("tensor parallelism")
def test_under_pressure_both_ranks_take_as_much_from_the_same_requests(server):
    server.flush()
    before, rounds = server.lethe(), agreed(server)
    server.post("/kv_evict", {"rounds": {"when": "pressure"}, "retain": {"prompt": "keep"}})
    server.generate_all(PROMPTS[:8], 8, tokens=190, ignore_eos=True)
    report = server.lethe()
    fewest = 3 if server.get("/server_info")["page_size"] == 1 else 2  # a share is in whole pages
    assert report["pressure"]["events"] >= fewest and report["pressure"]["share"] > 48
    assert report["requests_retracted"] == before["requests_retracted"]
    assert agreed(server) >= rounds + report["pressure"]["events"]
