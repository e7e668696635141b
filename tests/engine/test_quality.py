"""The live quality signal of one server: nothing lost, a good policy, and one that is bad on purpose."""

from __future__ import annotations

import time
import urllib.request

import pytest
from conftest import config
from problems import WALKS
from prometheus_client.parser import text_string_to_metric_families

PACKED = {"budget": 2048}
"""Packed every interval (``debug.pack_always``), and nothing is evicted."""
SETTINGS = config(
    budget={"tokens": 96},
    rounds={"interval": 16},
    lethe={"half_life": 7},
    requests={"max_budget": 4096},
    debug={"pack_always": True},
    pool={"states": "all"},
    monitor={"fraction": 1.0, "tokens_per_minute": 1_000_000},
)


@pytest.fixture(scope="module")
def server(start):
    flags = ("--enable-metrics", "--max-total-tokens", "8192", "--kv-evict", "lethe", "--kv-evict-config", SETTINGS)
    server = start(*flags).wait()
    yield server
    server.check_healthy()
    server.stop()


def scraped(server) -> dict:
    """The quality metrics by name and by the labels that are ours."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
        text = response.read().decode()
    ours, prefix = ("reason", "steps", "agree"), "sglang:kv_evict_quality_"
    return {
        (sample.name.removeprefix(prefix), *(sample.labels.get(label) for label in ours)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(prefix) and "le" not in sample.labels
    }


def measured(server, prompts, **asked) -> dict:
    """Serve prompts at temperature 1, wait for their probes, and return what /metrics counted, by (reason, steps)."""
    before, probes = scraped(server), server.lethe()["quality"]["probes"]
    server.generate_all(prompts, 3, tokens=160, temperature=1, ignore_eos=True, **asked)
    deadline = time.monotonic() + 60
    while server.lethe()["quality"]["probes"] < probes + len(prompts) or server.lethe()["quality"]["pending"]:
        assert time.monotonic() < deadline, server.lethe()["quality"]
        time.sleep(0.05)
    server.flush()  # a probe in flight ends for it
    after, found = scraped(server), {}
    for (name, reason, steps, agree), value in after.items():
        if name == "tokens_total":
            group = found.setdefault((reason, steps), {"yes": 0, "no": 0})
            group[agree] = value - before.get((name, reason, steps, agree), 0)
    for group, counted in found.items():
        counted["tokens"] = counted["yes"] + counted["no"]
        sums = [a.get(("k3_sum", *group, None), 0) for a in (after, before)]
        counts = [a.get(("k3_count", *group, None), 0) for a in (after, before)]
        assert counts[0] - counts[1] == counted["tokens"], "the histogram and the counter differ"
        counted["k3"] = (sums[0] - sums[1]) / max(counted["tokens"], 1)
    return {group: counted for group, counted in found.items() if counted["tokens"]}


def test_a_bad_policy_is_seen_beside_a_good_one_and_nothing_where_nothing_is_lost(server):
    prompts, none, early = WALKS[:3], ("none", "none"), ("interval", "0-15")
    before = server.get("/kv_evict/requests")["newest"]
    lossless = measured(server, prompts, kv_evict=PACKED)
    assert set(lossless) == {none, early}, lossless
    for group in lossless.values():
        assert group["no"] == 0 and group["k3"] < 1e-6, "a position was compared with another one"
    assert lossless[early]["tokens"] > 3 * 90

    good = measured(server, prompts)
    evil = {"policy": "streaming", "budget": {"tokens": 24}, "retain": {"prompt": "evict"}}
    assert "policy" in server.post("/kv_evict", evil)["changed"]
    bad = measured(server, prompts)
    for arm in (good, bad):
        assert arm[none]["no"] == 0 and arm[none]["k3"] < 1e-6, "nothing was evicted yet"
    after_rounds = [group for group in bad if group != none]
    assert after_rounds and good[early]["k3"] < 0.01, (good, bad)
    assert all(bad[group]["k3"] > 0.05 and bad[group]["no"] > 3 for group in after_rounds), (good, bad)

    report = server.lethe()["quality"]
    assert report["probes"] == 9 and report["skipped"] == {} and report["tokens"] > 9 * 160
    assert {(g["reason"], g["steps"]) for g in report["groups"]} == {none, early, *after_rounds}
    assert server.get("/kv_evict/requests")["newest"] == before + 9, "a probe was followed as a request"
    assert server.post("/kv_evict", {"monitor": {"fraction": 0}})["effective"] == "now"
    assert server.lethe()["quality"] is None
