"""Small pools: admission, retraction storms, private prompts, no radix tree, no overlap, breakpoint allocation."""

from __future__ import annotations

import re

import pytest
from conftest import config
from problems import PROMPTS, WALKS, prompt, walk

DEBUG = {"shadow": True}
BASE = dict(budget={"tokens": 48}, rounds={"interval": 16}, rasr={"half_life": 7}, requests={"max_budget": 1024})


def running(log: str) -> list[int]:
    return [int(n) for n in re.findall(r"Decode batch, #running-req: (\d+)", log)]


def mean_running(server) -> float:
    steps = running(server.log.read_text(errors="replace"))
    return sum(steps) / len(steps)


@pytest.fixture(scope="module")
def storm(start):
    """Private prompts, page 8, a tiny pool and SGLang's own retraction test every 7 steps; no overlap."""
    server = start(
        "--max-total-tokens", "640", "--page-size", "8", "--chunked-prefill-size", "32", "--disable-overlap-schedule",
        "--kv-evict", "lethe", "--kv-evict-config", config(**BASE, retain={"prompt": "private"}, debug=DEBUG),
        env={"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"},
    ).wait()  # fmt: skip
    yield server
    server.stop()


def test_retraction_storms_leak_nothing_and_gathered_cells_stay_right(storm):
    outputs = storm.generate_all(PROMPTS[:8], 8, tokens=150)
    assert all(o["meta"]["completion_tokens"] > 20 for o in outputs)
    report = storm.lethe()
    assert report["requests_retracted"] > 30
    assert report["rounds"] > 20 and report["shadow"]["checks"] > 2000
    storm.check_healthy()


def test_a_private_prompt_longer_than_the_budget_is_pruned(storm):
    problem, _ = walk(5, nodes=20, steps=40)
    storm.generate(prompt(problem), tokens=60)
    last = storm.lethe()["last_finished"]
    assert last["blocks_held_peak"] >= len(problem) > 80, "the prompt is intact first"
    assert min(storm.lethe()["tokens_evicted_per_layer"]) > 0
    storm.check_healthy()


def test_without_a_radix_tree_freed_memory_admits_more_requests(start):
    args = ("--max-total-tokens", "700", "--disable-radix-cache", "--decode-log-interval", "1")
    work = dict(tokens=260, ignore_eos=True)
    means = {}
    settings = config(**BASE, debug=DEBUG)
    for name, extra in (("stock", ()), ("lethe", ("--kv-evict", "lethe", "--kv-evict-config", settings))):
        server = start(*args, *extra).wait()
        server.generate_all(WALKS, 8, **work)
        means[name] = mean_running(server)
        if name == "lethe":
            report = server.lethe()
            assert report["rounds"] > 50 and report["shadow"]["checks"] > 5000
        server.check_healthy()
        server.stop()
    assert means["lethe"] >= 2 * means["stock"], means


def test_breakpoint_allocation_respects_the_mean_and_serves(start, tmp_path):
    settings = tmp_path / "breakpoint.yaml"
    settings.write_text(
        "budget: {tokens: 48, allocation: breakpoint}\nrounds: {interval: 16}\nrasr: {half_life: 7}\n"
        "breakpoint: {sparse_ratio: 20, segments: 16}\ndebug: {shadow: true, record_kept: true}\n"
    )
    server_yaml = tmp_path / "server.yaml"
    server_yaml.write_text(f"kv-evict: lethe\nkv-evict-config: {settings}\nmax-total-tokens: 1200\n")
    server = start("--config", str(server_yaml)).wait()  # SGLang's own --config file carries the plugin's flags
    problem, answer = walk(1, steps=60)
    assert server.generate(prompt(problem), tokens=400)["text"] == answer
    server.generate_all(PROMPTS[:8], 8)
    report = server.lethe()
    assert report["allocation"] == "breakpoint" and report["rounds"] > 20
    counts = [[len(layer) for layer in entry["kept"]] for entry in report["kept"]]
    assert all(sum(c) <= 4 * 33 for c in counts), "the mean budget was exceeded"
    assert len({tuple(c) for c in counts}) > 3, "every layer kept the same count: the rule was not applied"
    assert report["shadow"]["checks"] > 2000
    server.check_healthy()
