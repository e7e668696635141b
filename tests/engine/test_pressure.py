"""Small pools: admission, retraction storms, no radix tree, no overlap, breakpoint allocation."""

from __future__ import annotations

import re

import matrix
import pytest
from conftest import config
from problems import PROMPTS, WALKS, prompt, walk

DEBUG = {"shadow": True}
TIGHT = {"budget": 20}
"""Five cells a layer beside the recent window: a prompt among the candidates could not survive."""
BASE = dict(budget={"tokens": 48}, rounds={"interval": 16}, lethe={"half_life": 7}, requests={"max_budget": 1024})


def running(log: str) -> list[int]:
    return [int(n) for n in re.findall(r"Decode batch, #running-req: (\d+)", log)]


def mean_running(server) -> float:
    steps = running(server.log.read_text(errors="replace"))
    return sum(steps) / len(steps)


@pytest.mark.proves("overlap scheduler", "chunked prefill", "continuous batching, retraction, abort, pause")
def test_retraction_storms_leak_nothing_and_gathered_cells_stay_right(start):
    """Page 8, a tiny pool, no overlap and SGLang's own retraction test every 7 steps."""
    server = start(
        "--max-total-tokens",
        "640",
        "--page-size",
        "8",
        "--chunked-prefill-size",
        "32",
        "--disable-overlap-schedule",
        "--kv-evict",
        "lethe",
        "--kv-evict-config",
        config(**BASE, debug=DEBUG),
        env={"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"},
    ).wait()
    outputs = server.generate_all(PROMPTS[:8], 8, tokens=110)
    assert all(o["meta"]["completion_tokens"] > 20 for o in outputs)
    report = server.lethe()
    assert report["requests_retracted"] > 20
    assert report["rounds"] > 20 and report["shadow"]["checks"] > 2000
    lives = {}
    for record in server.get("/kv_evict/requests")["requests"]:
        lives.setdefault(record["rid"], []).append(record)
    for meta in (output["meta"] for output in outputs):
        records = lives[meta["id"]]
        assert len(records) <= meta["num_retractions"] + 1
        assert meta["kv_evict"]["rounds"] == sum(record["rounds"] for record in records)
        evicted = sum(sum(record["evicted_per_layer"]) for record in records)
        assert meta["kv_evict"]["tokens_evicted"] == round(evicted / 4, 1)
    server.check_healthy()

    # The problem is read until the last step: an answer is right only if retraction lost nothing of the prompt.
    problems = [walk(seed, steps=60) for seed in range(4)]
    outputs = server.generate_all([prompt(problem) for problem, _ in problems], 4, tokens=400, kv_evict=TIGHT)
    assert [o["text"] for o in outputs] == [answer for _, answer in problems]
    assert max(o["meta"]["num_retractions"] for o in outputs)

    # What was generated before a retraction stays the request's own, though no round has pruned it yet.
    outputs = server.generate_all(WALKS[:2], 2, tokens=60, kv_evict={"budget": 1024})
    assert server.lethe()["last_finished"]["rounds"] == 0
    assert max(o["meta"]["num_retractions"] for o in outputs) > 3
    for text, output in zip(WALKS[:2], outputs, strict=True):
        if output["meta"]["num_retractions"]:
            replay = server.generate(text + output["text"], tokens=1)
            assert replay["meta"]["cached_tokens"] <= len(text) + 8, "generated tokens were shared after a retraction"
    server.check_healthy()
    server.stop()


NO_TREE = ("--max-total-tokens", "700", "--disable-radix-cache", "--decode-log-interval", "1")


@pytest.fixture(scope="module", params=[1, 8], ids=lambda page: f"page{page}")
def treeless(request, start):
    settings = config(**BASE, debug=DEBUG, pool={"states": "all"})
    server = start(
        *NO_TREE, "--page-size", str(request.param), "--kv-evict", "lethe", "--kv-evict-config", settings
    ).wait()
    server.page = request.param
    yield server
    server.check_healthy()
    server.stop()


def test_without_a_radix_tree_freed_memory_admits_more_requests(start, treeless):
    if treeless.page != 1:
        pytest.skip("stock is measured at page size 1")
    work = dict(tokens=340, ignore_eos=True)  # the prompt is kept, so the gain shows in what is generated
    steps = len(running(treeless.log.read_text(errors="replace")))
    treeless.generate_all(WALKS, 8, **work)
    first = running(treeless.log.read_text(errors="replace"))[steps:][:40]
    assert max(first) >= 5, "a request was charged its whole length before anything of it was evicted"
    report = treeless.lethe()
    assert report["rounds"] > 50 and report["shadow"]["checks"] > 5000
    treeless.check_healthy()
    stock = start(*NO_TREE).wait()
    stock.generate_all(WALKS[:4], 4, **work)
    stock.check_healthy()
    stock.stop()
    assert mean_running(treeless) >= 2 * mean_running(stock)


def test_without_a_radix_tree_no_token_of_the_prompt_is_evicted(treeless):
    problems = [walk(seed) for seed in range(8)]
    outputs = treeless.generate_all([prompt(problem) for problem, _ in problems], 8, tokens=400, kv_evict=TIGHT)
    assert [o["text"] for o in outputs] == [answer for _, answer in problems]
    assert treeless.lethe()["last_finished"]["rounds"] > 6


@pytest.mark.parametrize("policy", matrix.POLICIES)
@pytest.mark.parametrize("treeless", [1], indirect=True, ids=["page1"])  # pages of eight: test_serving
def test_every_policy_runs_without_a_radix_tree(treeless, policy):
    matrix.run(treeless, policy)


def test_the_prompts_last_page_is_kept_though_the_tree_does_not_take_it(start):
    """Page 64: a prompt of under 64 tokens is no whole page."""
    settings = config(**{**BASE, "debug": {**DEBUG, "record_kept": True}})
    server = start(
        "--max-total-tokens", "4096", "--page-size", "64", "--kv-evict", "lethe", "--kv-evict-config", settings
    ).wait()
    problems = [walk(seed) for seed in range(8)]
    outputs = server.generate_all([prompt(problem) for problem, _ in problems], 8, tokens=400, kv_evict=TIGHT)
    assert [o["text"] for o in outputs] == [answer for _, answer in problems]
    report = server.lethe()
    assert report["rounds"] > 12
    for entry in report["kept"]:
        rest = set(range(entry["prefix"], entry["prefix"] + entry["rest"]))
        assert entry["prefix"] == 0 and len(rest) > 20
        assert all(len(kept) == len(rest) + 5 and rest <= set(kept) for kept in entry["kept"])
    server.check_healthy()
    server.stop()


def test_breakpoint_allocation_respects_the_mean_and_serves(start, tmp_path):
    settings = tmp_path / "breakpoint.yaml"
    settings.write_text(
        "budget: {tokens: 48, allocation: breakpoint}\nrounds: {interval: 16}\nlethe: {half_life: 2}\n"
        "debug: {shadow: true, record_kept: true}\n"
    )
    server_yaml = tmp_path / "server.yaml"
    server_yaml.write_text(f"kv-evict: lethe\nkv-evict-config: {settings}\nmax-total-tokens: 1200\n")
    server = start("--config", str(server_yaml)).wait()  # SGLang's own --config file carries the plugin's flags
    problem, answer = walk(1)
    assert server.generate(prompt(problem), tokens=400)["text"] == answer
    server.generate_all(PROMPTS[:8], 8, tokens=110)
    report = server.lethe()
    assert report["allocation"] == "breakpoint" and report["rounds"] > 20
    counts = [[len(layer) for layer in entry["kept"]] for entry in report["kept"]]
    assert all(sum(c) <= 4 * 33 for c in counts), "the mean budget was exceeded"
    assert len({tuple(c) for c in counts}) > 3, "every layer kept the same count: the rule was not applied"
    assert report["shadow"]["checks"] > 2000
    server.check_healthy()
