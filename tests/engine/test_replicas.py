"""Data-parallel replicas in one server, and servers behind SGLang's router: each evicts, and says so, for itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from conftest import ROOT, START_SECONDS, WARM, Forked, config
from problems import PROMPTS, WALKS
from prometheus_client.parser import text_string_to_metric_families

from lethe_bench.servers import some_free_port

SETTINGS = config(
    budget={"tokens": 48},
    rounds={"interval": 16},
    lethe={"half_life": 7},
    debug={"shadow": True},
    monitor={"fraction": 1.0},
)
FLAGS = ("--max-total-tokens", "2048", "--enable-metrics", "--kv-evict", "lethe", "--kv-evict-config", SETTINGS)


@pytest.fixture(scope="module")
def alone(start):
    """A server of one replica."""
    return start(*FLAGS)


@pytest.fixture(scope="module")
def pair(start, alone):
    """A server of two; both servers are ready."""
    server = start(*FLAGS, "--dp-size", "2").wait()
    alone.wait()
    yield server
    for each in (alone, server):
        each.check_healthy()
        each.stop()


def states(server) -> list[dict]:
    """What the replicas report, in their order: SGLang lists them as they answer."""
    found = [state["lethe"] for state in server.get("/server_info")["internal_states"]]
    return sorted(found, key=lambda state: state["dp_rank"])


def ask(server, text, rank=None, tokens=120, kv_evict=None, **sampling) -> dict:
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **sampling}
    params |= {} if kv_evict is None else {"custom_params": {"kv_evict": kv_evict}}
    return server.post("/generate", {"text": text, "sampling_params": params, "routed_dp_rank": rank})


@pytest.mark.proves("data parallelism (--dp-size)")
def test_both_replicas_evict_and_reply_as_one_server_does(alone, pair):
    expected = alone.generate_all(PROMPTS[:4], 4, tokens=110, ignore_eos=True)
    before = [state["rounds"] for state in states(pair)]
    found = pair.generate_all(PROMPTS[:4], 4, tokens=110, ignore_eos=True)
    assert [reply["text"] for reply in found] == [reply["text"] for reply in expected]
    told = [reply["meta"]["kv_evict"] for reply in found]
    assert told == [reply["meta"]["kv_evict"] for reply in expected] and min(each["rounds"] for each in told) >= 2
    ranks = [reply["meta"]["dp_rank"] for reply in found]
    assert ranks.count(0) == ranks.count(1) == 2
    rounds = [sum(each["rounds"] for each, rank in zip(told, ranks, strict=True) if rank == mine) for mine in (0, 1)]
    after = states(pair)
    assert [state["rounds"] - old for state, old in zip(after, before, strict=True)] == rounds
    records = pair.get("/kv_evict/requests?after=0,0")
    by_rid = {record["rid"]: record for record in records["requests"]}
    for reply in found:
        record = by_rid[reply["meta"]["id"]]
        assert (record["dp_rank"], record["rounds"]) == (reply["meta"]["dp_rank"], reply["meta"]["kv_evict"]["rounds"])
    newest = ",".join(map(str, records["newest"]))
    assert pair.get(f"/kv_evict/requests?after={newest}")["requests"] == []


def test_a_request_is_treated_as_it_asks_on_each_replica(pair):
    for rank in (0, 1):
        text = PROMPTS[6 + rank]
        own = ask(pair, text, rank, tokens=80)["meta_info"]
        assert own["dp_rank"] == rank and own["kv_evict"]["share"] <= 48
        assert "kv_evict" not in ask(pair, text, rank, tokens=4, kv_evict="none")["meta_info"]
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(pair, text, rank, tokens=4, kv_evict={"budget": 1})
        assert error.value.code == 400


@pytest.mark.proves("data parallelism (--dp-size)")
def test_a_live_server_changes_on_all_replicas_or_on_none(pair):
    """One replica decodes: what needs an idle server is refused by it, so the idle one does not take it either."""
    reply: dict = {}
    thread = threading.Thread(target=lambda: reply.update(ask(pair, WALKS[7], rank=1, tokens=400)))
    thread.start()
    deadline = time.monotonic() + 60
    while not states(pair)[1]["requests_running"]:
        assert time.monotonic() < deadline, "the request does not run"
        time.sleep(0.02)
    with pytest.raises(urllib.error.HTTPError) as error:
        pair.post("/kv_evict", {"retain": {"prompt": "evict"}})
    message = json.loads(error.value.read())["error"]["message"]
    assert message.startswith("dp_rank 1: kv_evict: retain.prompt: changes on an idle server only, and 1 requests")
    assert [state["prompt"] for state in states(pair)] == ["keep", "keep"]
    assert pair.get("/kv_evict")["configuration"]["retain"]["prompt"] == "keep"
    found = pair.post("/kv_evict", {"budget": {"tokens": 40}})
    assert found["changed"] == {"budget.tokens": [48, 40]} and found["effective"] == "next round"
    assert [state["budget_tokens"] for state in states(pair)] == [40, 40]
    thread.join()
    assert reply["meta_info"]["kv_evict"]["share"] <= 40
    pair.post("/kv_evict", {"retain": {"prompt": "evict"}, "budget": {"tokens": 48}})
    assert [(state["prompt"], state["budget_tokens"]) for state in states(pair)] == [("evict", 48)] * 2
    pair.post("/kv_evict", {"retain": {"prompt": "keep"}})


def test_metrics_and_quality_are_of_each_replica(pair):
    for rank in (0, 1):
        ask(pair, PROMPTS[6 + rank], rank, tokens=2)  # gauges are published at prefills
    deadline = time.monotonic() + 60
    while not all(state["quality"]["probes"] for state in states(pair)):
        assert time.monotonic() < deadline, [state["quality"] for state in states(pair)]
        time.sleep(0.1)
    with urllib.request.urlopen(f"{pair.url}/metrics", timeout=60) as response:
        text = response.read().decode()
    scraped: dict = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "layer_group" not in sample.labels:
                scraped.setdefault(sample.name, {})[sample.labels.get("dp_rank")] = sample.value
    told = states(pair)
    names = {
        "rounds": "rounds_total",
        "blocks_freed_total": "blocks_freed_total",
        "requests_pruned": "requests_pruned_total",
    }
    for key, name in names.items():
        assert scraped[f"sglang:kv_evict_{name}"] == {str(rank): told[rank][key] for rank in (0, 1)}, key
    assert scraped["sglang:kv_evict_budget_tokens"] == {"0": 48, "1": 48}
    assert set(scraped["sglang:kv_evict_quality_probes_total"]) == {"0", "1"}
    out = WARM.run(["-m", "lethe_sglang.cli.main", "top", pair.url, "--once"])
    assert "replicas   2 data-parallel ones" in out.stdout, out.stdout + out.stderr
    assert f"rounds     {told[0]['rounds'] + told[1]['rounds']:,}" in out.stdout and "at the floor of 48" in out.stdout


@pytest.mark.skipif("LETHE_SLOW" not in os.environ, reason="four schedulers on two cores: LETHE_SLOW=1 runs it")
def test_ranks_of_each_replica_keep_the_same_cells(start, alone):
    """Two replicas of two tensor-parallel ranks each: scores are averaged within a replica and nowhere else."""
    often = {"budget": {"tokens": 24}, "rounds": {"interval": 8}, "debug": {"shadow": True, "kept_hash": True}}
    flags = [*FLAGS[:-1], json.dumps(json.loads(SETTINGS) | often)]
    server = start(*flags, "--dp-size", "2", "--tp", "2").wait()
    alone.wait()
    found = server.generate_all(WALKS[:2], 2, tokens=48)
    assert [reply["text"] for reply in found] == [
        alone.generate(text, tokens=48, kv_evict={"budget": 24})["text"] for text in WALKS[:2]
    ]
    assert {reply["meta"]["dp_rank"] for reply in found} == {0, 1}
    assert server.post("/kv_evict", {"budget": {"tokens": 20}})["changed"] == {"budget.tokens": [24, 20]}
    assert [state["budget_tokens"] for state in states(server)] == [20, 20]
    later = [ask(server, text, rank, tokens=40)["meta_info"] for rank, text in enumerate(WALKS[2:4])]
    assert [(meta["dp_rank"], meta["kv_evict"]["share"]) for meta in later] == [(0, 20), (1, 20)]
    server.check_healthy()
    kept = re.findall(r"DP(\d) TP(\d)\] KV eviction: kept-set hash (\d+) ([0-9a-f]+)", server.log.read_text())
    for replica in "01":
        by_rank = [[line[2:] for line in kept if line[:2] == (replica, rank)] for rank in "01"]
        assert by_rank[0] == by_rank[1] and len(by_rank[0]) >= 4
    server.stop()


class Router(Forked):
    """SGLang's router in front of servers."""

    def __init__(self, log, *urls, policy="round_robin"):
        port, more = some_free_port(), ("--prometheus-port", str(some_free_port()), "--log-level", "warn")
        command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--worker-urls", *urls, "--policy", policy, *more]
        super().__init__(command, port, log)
        self.start()

    def wait(self):
        """Until it knows two healthy servers."""
        super().wait(START_SECONDS)
        while True:
            with contextlib.suppress(urllib.error.HTTPError):  # it knows none yet
                if self.get("/readiness")["healthy_workers"] == 2:
                    return
            assert time.monotonic() - self._started < START_SECONDS, self.log.read_text()
            time.sleep(0.05)


@pytest.mark.proves("several servers behind SGLang's router")
def test_the_example_of_servers_behind_sglangs_router(alone, pair, log_dir):
    router = Router(log_dir / "router.log", alone.url, pair.url)
    before = [state["rounds"] for server in (alone, pair) for state in states(server)]
    try:
        router.wait()
        out = WARM.run([ROOT / "examples" / "router.py", router.url, alone.url, pair.url])
    finally:
        router.stop()
        for server in (alone, pair):
            server.post("/kv_evict", {"budget": {"tokens": 48}})
    assert out.returncode == 0, out.stdout + out.stderr
    asked, wide, none, *rest = out.stdout.splitlines()
    assert re.fullmatch(r"on: \{'rounds': \d+, .*'share': (4[0-8](\.\d)?)\}", asked), asked
    assert re.fullmatch(r"\{\"budget\": 96\}: \{'rounds': \d+, .*'share': (9[0-6](\.\d)?)\}", wide), wide
    assert none == "none: None"
    assert rest[:2] == [f"{s.url} changed {{'budget.tokens': [48, 40]}}" for s in (alone, pair)]
    assert all(re.fullmatch(r"on: \{.*'share': (3\d|40)(\.\d)?\}", line) for line in rest[2:4]), rest
    told = [re.fullmatch(r"(\S+) dp_rank (\d): budget 40, (\d+) rounds", line).groups() for line in rest[4:]]
    assert sorted((url, rank) for url, rank, _ in told) == sorted([(alone.url, "0"), (pair.url, "0"), (pair.url, "1")])
    grown = {url: sum(int(rounds) for where, _, rounds in told if where == url) for url, *_ in told}
    assert grown[alone.url] > before[0] and grown[pair.url] > before[1] + before[2], "the router asked one server alone"


def test_what_a_request_asks_for_arrives_through_a_cache_aware_router(alone, pair, log_dir):
    """The router's default policy, on the routes of OpenAI's API; it has no place for ``custom_params``."""
    model = alone.get("/v1/models")["data"][0]["id"]  # the router has no server of another
    sampling = {"model": model, "temperature": 0, "ignore_eos": True}
    routes = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 90},
        "/v1/completions": {"prompt": PROMPTS[0], "max_tokens": 90},
        "/v1/responses": {"input": PROMPTS[0], "max_output_tokens": 90, "stream": False},  # without, it sends null
    }
    router = Router(log_dir / "router-2.log", alone.url, pair.url, policy="cache_aware")
    pruned = []
    try:
        router.wait()
        for asked in ('{"budget": 64}', "none"):
            for path, body in routes.items():
                before = sum(state["requests_pruned"] for server in (alone, pair) for state in states(server))
                header = {"X-Request-Id-KV-Evict": asked, "content-type": "application/json"}
                request = urllib.request.Request(
                    f"{router.url}{path}", json.dumps({**sampling, **body}).encode(), header
                )
                try:
                    with urllib.request.urlopen(request, timeout=120) as answer:
                        told = json.load(answer).get("usage", {}).get("kv_evict")
                except urllib.error.HTTPError as error:
                    raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from None
                after = sum(state["requests_pruned"] for server in (alone, pair) for state in states(server))
                pruned.append((path, asked, after - before))
                if path != "/v1/responses" and asked != "none":
                    assert 48 < told["share"] <= 64, (path, told)
    finally:
        router.stop()
    assert pruned == [(path, asked, int(asked != "none")) for asked in ('{"budget": 64}', "none") for path in routes]
