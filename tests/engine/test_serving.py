"""One server per page size, launched by SGLang's own front doors, that serves every arm of the comparison.

Per-request overrides choose the arm: mode none is never evicted from; a budget of 2,048 is packed every interval
(``debug.pack_always``) but never loses a token; the server's own budget of 48 evicts. The shadow compares every
gathered cell with an uncompressed copy at every step of all of them.
"""

from __future__ import annotations

import functools
import itertools
import json
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import matrix
import pytest
from conftest import config
from problems import CHAINS, PROMPTS, WALKS, prompt, walk

SETTINGS = config(
    budget={"tokens": 48},
    rounds={"interval": 16},
    lethe={"half_life": 7},
    requests={"max_budget": 4096},
    debug={"shadow": True, "pack_always": True, "record_kept": True},
    pool={"states": "all"},
)
PAGES = {
    1: dict(entry=("-m", "sglang.launch_server"), chunk="64"),
    8: dict(entry=("-c", "from sglang.cli.main import main; main()", "serve"), chunk="32"),
}
SINKS, RECENT = 4, 15
TOKENS = 180
"""Of a reply, so that the pool holds all prompts at once."""


@pytest.fixture(scope="module")
def stock(start):
    """Greedy outputs of stock SGLang at its defaults: the reference."""
    server = start("--max-total-tokens", "4096").wait()
    outputs = server.generate_all(PROMPTS, 16, tokens=TOKENS)
    server.stop()
    return outputs


@pytest.fixture(scope="module", params=PAGES, ids=lambda page: f"page{page}")
def server(request, start):
    door = PAGES[request.param]
    server = start(
        "--max-total-tokens",
        "4096",
        "--page-size",
        str(request.param),
        "--chunked-prefill-size",
        door["chunk"],
        "--kv-evict",
        "lethe",
        "--kv-evict-config",
        SETTINGS,
        entry=door["entry"],
    ).wait()
    server.page = request.param
    yield server
    server.check_healthy()
    server.stop()


@pytest.mark.proves("page sizes")
def test_budget_above_length_gives_the_tokens_of_stock(stock, server):
    ours = server.generate_all(PROMPTS, 16, tokens=TOKENS, kv_evict={"budget": 2048})
    assert [o["text"] for o in ours] == [s["text"] for s in stock]
    assert server.lethe()["rounds"] > len(PROMPTS), "packing was not forced"


def test_packing_without_evicting_is_bit_identical_to_no_round_at_all(server):
    for text in (CHAINS[1], WALKS[0]):
        arms = []
        for arm in ("none", {"budget": 2048}):
            server.flush()
            arms.append(server.generate(text, tokens=78, kv_evict=arm, logprobs=True))
        assert arms[0]["ids"] == arms[1]["ids"]
        assert arms[0]["logprobs"] == arms[1]["logprobs"]
    assert server.lethe()["last_finished"]["rounds"] > 2


@pytest.mark.proves("overlap scheduler")
def test_eviction_is_real_bounded_and_answers_stay_right(server):
    server.flush()
    before = server.lethe()
    problem, answer = walk(3, steps=48)
    assert server.generate(prompt(problem), tokens=400)["text"] == answer
    after = server.lethe()["last_finished"]
    assert after["rounds"] >= 10
    assert min(after["evicted_per_layer"]) > 150
    prompt_blocks = -(-len(problem) // server.page) * server.page + server.page
    assert after["held_peak"] <= prompt_blocks + 48 + 16 + 2 * server.page
    assert after["held_peak"] <= 0.4 * after["stock_peak"]
    assert sum(server.lethe()["tokens_evicted_per_layer"]) > sum(before["tokens_evicted_per_layer"])


@pytest.mark.proves("attention backend torch_native")
def test_every_gathered_cell_equalled_the_uncompressed_one(server):
    before = server.lethe()["shadow"]
    server.generate_all(PROMPTS[:8], 8, tokens=120)
    shadow = server.lethe()["shadow"]
    assert shadow["checks"] > before["checks"] + 2500 and shadow["cells"] > before["cells"] + 200_000


@pytest.mark.proves("continuous batching, retraction, abort, pause")
def test_output_does_not_depend_on_the_batch(server):
    work = dict(tokens=72, kv_evict={"budget": 24})
    alone = [server.generate(p, **work)["text"] for p in PROMPTS[:2]]
    for times, concurrency in ((3, 6), (12, 24)):
        together = server.generate_all(PROMPTS[:2] * times, concurrency, **work)
        assert [t["text"] for t in together] == alone * times
    assert server.lethe()["last_finished"]["rounds"] >= 3


@pytest.mark.proves("radix prefix cache")
def test_a_sharer_of_a_pruned_requests_prefix_is_unchanged(stock, server):
    server.flush()
    rounds = server.lethe()["rounds"]
    with ThreadPoolExecutor(1) as pool:
        pruned = pool.submit(server.generate, WALKS[0], TOKENS)
        server.until_rounds(rounds + 1, pruned)
        sharer = server.generate(WALKS[0], 110, kv_evict="none")
    again = server.generate(WALKS[0], 60, kv_evict="none")
    assert (sharer["text"], again["text"]) == (stock[0]["text"][:110], stock[0]["text"][:60])
    if server.page < len(WALKS[0]):
        assert again["meta"]["cached_tokens"] > 0, "the prompt was not shared"


@pytest.mark.proves("radix prefix cache")
def test_nothing_with_holes_enters_the_tree(server):
    server.flush()
    output = server.generate(WALKS[1], tokens=140)["text"]
    assert len(output) == 140
    replay = server.generate(WALKS[1] + output, tokens=4)
    assert replay["meta"]["cached_tokens"] <= len(WALKS[1]) + 1


def test_sinks_and_the_recent_window_are_never_evicted(server):
    server.flush()
    server.generate(WALKS[2], tokens=180)
    report = server.lethe()
    log = [entry for entry in report["kept"] if entry["rid"] == report["last_finished"]["rid"]]
    assert len(log) >= 7
    seen = {}
    for entry in log:
        for layer, kept in enumerate(entry["kept"]):
            assert kept == sorted(set(kept)), "packed cells are not in ascending position"
            assert set(range(entry["prefix"], SINKS)) <= set(kept)
            assert set(kept) <= seen.get(layer, set()) | set(range(entry["prefix"], entry["tail"]))
            seen[layer] = set(kept)
    tails = [entry["tail"] for entry in log]
    gaps = [b - a for a, b in itertools.pairwise(tails)]
    assert all(gap >= 16 for gap in gaps), "a round came before its interval"


@pytest.mark.proves("continuous batching, retraction, abort, pause")
def test_abort_and_disconnect_in_the_middle_lose_nobody_elses_kv(stock, server):
    server.flush()
    survivors = [
        threading.Thread(
            target=lambda i=i: results.__setitem__(i, server.generate(PROMPTS[i], TOKENS, kv_evict={"budget": 2048}))
        )
        for i in range(3)
    ]
    results = {}
    for thread in survivors:
        thread.start()
    for _ in range(4):
        with pytest.raises((TimeoutError, OSError)):
            body = {"text": WALKS[5], "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}}
            server.post("/generate", body, timeout=0.4)
    victim = {"text": WALKS[6], "rid": "victim", "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}}
    doomed = threading.Thread(target=lambda: server.post("/generate", victim))
    doomed.start()
    time.sleep(1.0)
    server.post("/abort_request", {"rid": "victim"})
    doomed.join(timeout=60)
    assert not doomed.is_alive()
    for thread in survivors:
        thread.join()
    assert [results[i]["text"] for i in range(3)] == [stock[i]["text"] for i in range(3)]


def test_a_prompt_is_kept_through_a_retraction_that_lost_it_from_the_tree(server):
    """As an update of the weights does: pause, retract, flush the tree, continue."""
    asked, answers = zip(*(walk(seed, steps=30) for seed in range(4)), strict=True)
    server.flush()
    flush = functools.partial(server.post, "/flush_cache")
    replies = server.retracted([*map(prompt, asked)], flush, tokens=400, kv_evict={"budget": 20})
    assert tuple(reply["text"] for reply in replies) == answers
    assert server.lethe()["last_finished"]["rounds"] > 5


@pytest.mark.parametrize("server", [1], indirect=True, ids=["page1"])
@pytest.mark.proves("continuous batching, retraction, abort, pause")
def test_pause_and_continue_keep_the_output(server):
    expected = server.generate(WALKS[4], tokens=130)["text"]
    for mode in ("in_place", "retract"):
        assert any(paused_in_the_middle(server, mode, expected) for _ in range(5)), "it had ended before every pause"


def paused_in_the_middle(server, mode, expected) -> bool:
    """Whether the pause came before the reply's end, which on a busy machine it need not."""
    rounds = server.lethe()["rounds"]
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.generate, WALKS[4], tokens=130)
        server.until_rounds(rounds + 2, reply)
        with server.paused(mode):
            checks = server.lethe()["shadow"]["checks"]
            time.sleep(0.3)
            assert server.lethe()["shadow"]["checks"] == checks, "a step was decoded in the pause"
            running = not reply.done()
        assert reply.result()["text"] == expected
    return running


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"budget": 3}, "custom_params.kv_evict.budget"),
        ({"budget": 999_999}, "custom_params.kv_evict.budget"),
        ({"mode": "maybe"}, "custom_params.kv_evict.mode"),
        ({"bugdet": 60}, "did you mean custom_params.kv_evict.budget"),
        (7, "custom_params.kv_evict"),
    ],
)
def test_a_bad_override_is_a_400_that_names_the_option(server, asked, named):
    with pytest.raises(urllib.error.HTTPError) as error:
        server.generate(WALKS[0], kv_evict=asked)
    assert error.value.code == 400
    assert named in json.loads(error.value.read())["error"]["message"]


@pytest.mark.parametrize("kv_evict", [None, "none"])
def test_beam_search_is_a_400_and_costs_nobody_a_reply(stock, server, kv_evict):
    with pytest.raises(urllib.error.HTTPError) as error:
        server.generate(WALKS[0], tokens=60, kv_evict=kv_evict, beam_width=3)
    assert error.value.code == 400
    assert "leave sampling_params.beam_width out" in json.loads(error.value.read())["error"]["message"]
    ours = server.generate_all(PROMPTS[:2], 2, tokens=60, kv_evict={"budget": 2048})
    assert [o["text"] for o in ours] == [s["text"][:60] for s in stock[:2]]


def test_a_smaller_budget_of_one_request_is_honoured(server):
    server.flush()
    server.generate(WALKS[0], tokens=90, kv_evict={"budget": 24})
    small = server.lethe()["last_finished"]["evicted_per_layer"][0]
    server.generate(WALKS[0], tokens=90, kv_evict={"budget": 60})
    assert small > server.lethe()["last_finished"]["evicted_per_layer"][0]


@pytest.mark.parametrize("policy", matrix.POLICIES)
@pytest.mark.parametrize("server", [8], indirect=True, ids=["page8"])  # pages of one token: test_pressure, test_shares
def test_every_policy_runs_on_the_radix_tree(server, policy):
    matrix.run(server, policy)
