"""Rounds only when the pool is short (``rounds.when: pressure``): stock's replies with room, shares without."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import config
from problems import CHAINS, PROMPTS, WALKS

from lethe_sglang.policies import policy_names

POOL, FLOOR = 1200, 48
SETTINGS = dict(
    budget={"tokens": FLOOR},
    rounds={"interval": 16, "when": "pressure"},
    lethe={"half_life": 7},
    debug={"shadow": True},
    pool={"states": "all"},
)
LONG = dict(tokens=340, ignore_eos=True)


@pytest.fixture(scope="module", params=[1, 8], ids=lambda page: f"page{page}")
def pressed(request, start):
    server = start(
        *("--max-total-tokens", str(POOL), "--page-size", str(request.param), "--decode-log-interval", "1"),
        *("--kv-evict", "lethe", "--kv-evict-config", config(**SETTINGS)),
    ).wait()
    server.page = request.param
    yield server
    server.check_healthy()
    server.stop()


def test_with_room_no_token_is_evicted_and_replies_are_stocks(start, pressed):
    if pressed.page != 1:
        pytest.skip("stock is asked at page size 1")
    alone = [pressed.generate(text, **LONG)["ids"] for text in PROMPTS[:4]]
    report = pressed.lethe()
    assert report["rounds"] == report["pressure"]["events"] == 0
    assert report["last_finished"]["stock_peak"] > 3 * FLOOR, "no request was longer than its budget"
    stock = start("--max-total-tokens", str(POOL)).wait()
    assert [stock.generate(text, **LONG)["ids"] for text in PROMPTS[:4]] == alone
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
    pressed.check_healthy()


@pytest.mark.parametrize("policy", policy_names())
def test_every_policy_gives_under_pressure(pressed, policy):
    pressed.flush()
    pressed.post("/kv_evict", {"policy": policy})
    before = pressed.lethe()
    pressed.generate_all(WALKS[:6], 6, tokens=260, ignore_eos=True)
    report = pressed.lethe()
    assert report["policy"] == policy and report["rounds"] > before["rounds"] + 4
    assert report["requests_retracted"] == before["requests_retracted"]
    pressed.check_healthy()


HERE = Path(__file__).parent
GRAPHS = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{HERE / 'graphs_on_cpu'}:{HERE / 'flashinfer_on_cpu'}"}


def test_replayed_steps_of_unequal_layers_read_shares_right(start):
    """A share scales the layers' budgets, so that a class of layers stays a class and shares its plan and lists."""
    settings = dict(
        budget={"allocation": "list", "layers": [10, 16, 12, 19]},
        rounds={"interval": 4, "when": "pressure"},
        retain={"recent_ratio": 0.3},
        debug={"shadow": True},
    )
    server = start(
        *("--max-total-tokens", "216", "--max-running-requests", "4", "--context-length", "240", "--page-size", "8"),
        *("--attention-backend", "flashinfer", "--cuda-graph-bs-decode", "1", "2", "--disable-radix-cache"),
        *("--kv-evict", "lethe", "--kv-evict-config", config(**settings)),
        env=GRAPHS,
    ).wait()
    server.generate_all(CHAINS[:2], 2, tokens=54, ignore_eos=True)
    report = server.lethe()
    assert report["pressure"]["events"] >= 1 and report["rounds"] >= 2 and report["requests_retracted"] == 0
    assert report["pressure"]["share"] > 14, "a share of the floor alone says nothing of scaling"
    assert report["shadow"]["cells"] >= 20_000
    server.check_healthy()
    server.stop()
