"""Whole servers whose decode steps are replayed, against eager servers of the portable backend.

SGLang's decode graph runner captures and replays (batch buckets, padding, metadata), on a CPU: a graph is what
``graphs_on_cpu`` records. FlashInfer's wrappers are ``flashinfer_on_cpu``, FlashAttention is ``flashattention_on_cpu``,
and Triton kernels run under the interpreter.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import config
from problems import CHAINS, WALKS

HERE = Path(__file__).parent
DOUBLES = {
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": ":".join(str(HERE / f"{name}_on_cpu") for name in ("graphs", "flashinfer", "flashattention")),
}
UNIFORM = {"allocation": "uniform", "tokens": 19}
"""Said in full, as the eager server keeps what the settings before it said."""
PER_LAYER = {"allocation": "list", "layers": [10, 16, 12, 19]}
SETTINGS = {
    "lethe-uniform": ({"policy": "lethe", "budget": UNIFORM, "lethe": {"half_life": 7}}, "1"),
    "snapkv-breakpoint": (
        {"policy": "snapkv", "budget": {"tokens": 19, "allocation": "breakpoint"}, "snapkv": {"window": 5}},
        "1",
    ),
    "keydiff-uniform": ({"policy": "keydiff", "budget": UNIFORM}, "1"),
    "lazy-pages": ({"policy": "lazy", "budget": PER_LAYER, "lazy": {"threshold": 0.02}}, "16"),
    "lethe-pages": ({"policy": "lethe", "budget": UNIFORM, "lethe": {"half_life": 7}}, "16"),
}
"""Policy and budget, and page size."""
PORTABLE = {"lethe-pages": {"PYTHONPATH": str(HERE / "flashattention_on_cpu"), "WHOLE_PAGES": "1"}}
"""What the eager server of the portable backend needs to keep what the other one does."""
REPLAYED = [("lethe-uniform", "flashinfer"), ("snapkv-breakpoint", "flashinfer"), ("lazy-pages", "flashinfer")]
REPLAYED += [("keydiff-uniform", "flashinfer")]  # nothing is scored
REPLAYED += [("lethe-pages", "fa3")]  # pages of one token are replayed where every third step is scored
EVERY = {"lethe": {"score_every": 3}}
JOBS = [(WALKS[0], 26), (CHAINS[1], 44), (WALKS[1], 34)]
LONGER = {name: [(prompt, 3 * tokens // 2) for prompt, tokens in JOBS] for name in ("lethe-pages", "lazy-pages")}
"""Whole pages leave room behind a prompt."""


def serve(start, name, backend, plant=None, more=None):
    settings, page = SETTINGS[name]
    settings = settings | {key: {**settings.get(key, {}), **value} for key, value in (more or {}).items()}
    debug = {"record_kept": True, "shadow": plant is None}  # which would stop a server that reads something stale
    rest = {"rounds": {"interval": 8}, "retain": {"recent_ratio": 0.3}, "debug": debug}
    graphs = backend != "torch_native"
    return start(
        *("--max-total-tokens", "2048", "--max-running-requests", "4", "--context-length", "240"),
        *("--page-size", page, "--kv-evict", settings["policy"], "--kv-evict-config", config(**settings, **rest)),
        *("--attention-backend", backend),
        *(("--cuda-graph-bs-decode", "1", "2") if graphs else ()),
        env={**DOUBLES, "GRAPHS_ON_CPU_PLANT": plant or ""} if graphs else PORTABLE.get(name, {}),
    ).wait()


def ask(server, rid, prompt, tokens):
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return server.post("/generate", {"text": prompt, "rid": rid, "sampling_params": sampling})["text"]


def replies(server, jobs=JOBS, at_once=3):
    """Run three at once, one after the other ends: from an eager batch to buckets of two and one."""
    with ThreadPoolExecutor(at_once) as pool:
        texts = list(pool.map(lambda n: ask(server, f"r{n}", *jobs[n]), range(len(jobs))))
    kept = {(entry["rid"], entry["round"]): entry["kept"] for entry in server.lethe()["kept"]}
    return texts, {key: value for key, value in kept.items() if key[0].startswith("r")}


def compared(server):
    return server.lethe()["shadow"]["cells"]


@pytest.fixture(scope="module")
def eager(start):
    """What an eager server of the portable backend answers and keeps, by the name of its settings.

    One server goes over all settings of pages of one token; with larger pages each has its own.
    """
    found, alive = {}, {}

    def answers(name):
        if name in found:
            return found[name]
        settings, page = SETTINGS[name]
        if page in alive:
            server, before = alive[page], compared(alive[page])
            server.post("/kv_evict", settings)
        else:
            server, before = serve(start, name, "torch_native", more={"pool": {"states": "all"}}), 0
        found[name] = *replies(server, LONGER.get(name, JOBS)), compared(server) - before
        if name == "lethe-uniform":
            server.post("/kv_evict", EVERY)
            found["every"] = replies(server, at_once=1)
        if page == "1":
            alive[page] = server
        else:
            server.stop()
        return found[name]

    yield answers
    for server in alive.values():
        server.stop()


@pytest.mark.parametrize(("name", "backend"), REPLAYED)
@pytest.mark.proves("attention backends flashinfer and triton, CUDA graphs", "attention backend fa3, CUDA graphs")
def test_replayed_steps_answer_and_keep_what_eager_ones_do(start, eager, name, backend):
    expected = eager(name)
    server = serve(start, name, backend)
    assert server.log.read_text().count("graphs_on_cpu: captured") == 2
    found = replies(server, LONGER.get(name, JOBS))
    assert found[0] == expected[0]
    assert len(found[1]) >= (5 if SETTINGS[name][1] == "1" else 3) and found[1] == expected[1]
    assert min(compared(server), expected[2]) >= 15_000, "cells that were compared with uncompressed ones"
    if (name, backend) == ("lethe-uniform", "flashinfer"):
        survive(server, expected[0][0])
    server.check_healthy()
    server.stop()


@pytest.mark.parametrize("backend", ["flashinfer", "fa3"])
def test_steps_that_are_not_scored_are_replayed_from_graphs_of_their_own(start, eager, backend):
    """One request at a time: where several run, the phase of a step depends on when they came."""
    every_step = eager("lethe-uniform")
    expected = eager("every")
    assert expected[1] != every_step[1], "scoring every third step keeps the same: the test says nothing"
    server = serve(start, "lethe-uniform", backend, more=EVERY)
    captured = re.findall(r"graphs_on_cpu: captured .*'(plain|scored)'.*: (\d+) operations", server.log.read_text())
    operations = {variant: int(count) for variant, count in captured}
    assert len(captured) == 4 and operations["plain"] < operations["scored"]
    assert replies(server, at_once=1) == expected
    server.check_healthy()
    server.stop()


def survive(server, first):
    """A batch that is retracted, and one that is aborted, leave the graphs as they were."""
    rounds = server.lethe()["rounds"]
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(ask, server, f"x{n}", WALKS[n + 2], 36) for n in range(2)]
        gone = pool.submit(ask, server, "gone", CHAINS[0], 150)
        server.until_rounds(rounds + 2, *running)
        with server.paused("retract"):
            pass
        server.until_rounds(server.lethe()["rounds"] + 1, *running)
        server.post("/abort_request", {"rid": "gone"})
        assert all(reply.result() for reply in running)
        gone.result()
    assert server.lethe()["requests_retracted"] >= 1
    assert ask(server, "again", *JOBS[0]) == first


@pytest.mark.parametrize("plant", ["integer", "tensor"])
def test_a_stale_value_in_a_graph_shows(start, eager, plant):
    """A number read on the host at capture, and a tensor that is not at the captured address."""
    texts, kept, _ = eager("lethe-uniform")
    server = serve(start, "lethe-uniform", "flashinfer", plant=plant)
    assert replies(server, JOBS[:1]) != (texts[:1], {key: value for key, value in kept.items() if key[0] == "r0"})
    server.stop()
