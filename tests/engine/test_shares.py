"""Rounds only when the pool is short (``rounds.when: pressure``): stock's replies with room, shares without."""

from __future__ import annotations

import re
import time

import pytest
from conftest import config
from problems import PROMPTS, WALKS

from lethe_sglang.cli import top
from lethe_sglang.policies import policy_names

POOL, FLOOR = 1000, 48
SETTINGS = dict(
    budget={"tokens": FLOOR},
    rounds={"interval": 16, "when": "pressure"},
    lethe={"half_life": 7},
    debug={"shadow": True},
    pool={"states": "all"},
    monitor={"fraction": 1.0},
)
LONG = dict(tokens=220, ignore_eos=True)
ROOM = dict(tokens=130, ignore_eos=True)


@pytest.fixture(scope="module", params=[1, 8], ids=lambda page: f"page{page}")
def pressed(request, start):
    server = start(
        *("--max-total-tokens", str(POOL), "--page-size", str(request.param), "--decode-log-interval", "1"),
        *("--kv-evict", "lethe", "--kv-evict-config", config(**SETTINGS), "--enable-metrics"),
    ).wait()
    server.page = request.param
    yield server
    server.check_healthy()
    server.stop()


def test_with_room_no_token_is_evicted_and_replies_are_stocks(start, pressed):
    if pressed.page != 1:
        pytest.skip("stock is asked at page size 1")
    alone = [pressed.generate(text, **ROOM)["ids"] for text in PROMPTS[:2]]
    report = pressed.lethe()
    assert report["rounds"] == report["pressure"]["events"] == 0
    assert report["last_finished"]["stock_peak"] > 3 * FLOOR, "no request was longer than its budget"
    stock = start("--max-total-tokens", str(POOL)).wait()
    assert [stock.generate(text, **ROOM)["ids"] for text in PROMPTS[:2]] == alone
    stock.stop()


def test_a_full_pool_is_shared_and_nobody_is_retracted(pressed):
    before = pressed.lethe()
    outputs = pressed.generate_all(WALKS, 8, **LONG)
    assert all(o["meta"]["completion_tokens"] == LONG["tokens"] for o in outputs)
    report = pressed.lethe()
    assert report["pressure"]["events"] > before["pressure"]["events"] + 3
    assert report["rounds"] > before["rounds"] + 20
    assert report["requests_retracted"] == before["requests_retracted"]
    assert report["pressure"]["share"] >= FLOOR
    assert report["shadow"]["checks"] > before["shadow"]["checks"] + 5000
    shares = [o["meta"]["kv_evict"]["share"] for o in outputs if o["meta"]["kv_evict"]["rounds"]]
    assert len(shares) >= 6 and min(shares) >= FLOOR and max(shares) > FLOOR, shares
    pressed.check_healthy()  # idle: SGLang has published its gauges
    page = top.scrape(pressed.url)
    assert page["sglang:kv_evict_pressure_events_total"] == report["pressure"]["events"]
    assert page["sglang:kv_evict_pressure_share_tokens"] == report["pressure"]["share"]
    assert page["sglang:kv_evict_held_blocks"] == pressed.lethe()["blocks_held"] == 0
    assert re.search(r"lethe share: \d+, #at-floor: \d", pressed.log.read_text())
    while not pressed.lethe()["quality"]["probes"]:  # the test's own timeout ends it
        time.sleep(0.1)
    told = top.scrape(pressed.url).by("sglang:kv_evict_quality_k3_count", "reason")
    assert told["pressure"] and not told.get("interval"), told


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("pressed", [1], indirect=True, ids=["page1"])
def test_every_policy_gives_under_pressure(pressed, policy):
    pressed.flush()
    pressed.post("/kv_evict", {"policy": policy})
    before = pressed.lethe()
    pressed.generate_all(WALKS, 8, tokens=150, ignore_eos=True)
    report = pressed.lethe()
    assert report["policy"] == policy and report["rounds"] >= before["rounds"] + 4
    assert report["requests_retracted"] == before["requests_retracted"]
    pressed.check_healthy()
