"""The whole server with the Triton backend on a CPU: SGLang's decode kernel and ours under Triton's interpreter.

Scheduler, overlap, radix tree, rounds and lists are the real ones; what a GPU adds is the compiler, CUDA graphs
and streams. The same requests on the portable backend are the reference.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import config
from problems import CHAINS, WALKS

SETTINGS = config(
    budget={"allocation": "list", "layers": [12, 24, 16, 28]}, rounds={"interval": 8}, rasr={"half_life": 7},
    retain={"recent_ratio": 0.3}, debug={"record_kept": True},
)  # fmt: skip
PROMPTS = [WALKS[0], WALKS[1], CHAINS[1]]
TOKENS = 44


def serve(start, backend, **env):
    """Run all prompts at once, the last one alone again; return texts and what every round kept, per request."""
    server = start(
        "--max-total-tokens", "1024", "--max-running-requests", "4", "--attention-backend", backend,
        "--kv-evict", "lethe", "--kv-evict-config", SETTINGS, env=env,
    ).wait()  # fmt: skip

    def ask(number):
        sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        body = {"text": PROMPTS[number], "rid": f"r{number}", "sampling_params": sampling}
        return server.post("/generate", body)["text"]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        texts = list(pool.map(ask, range(len(PROMPTS))))
    kept = {(entry["rid"], entry["round"]): entry["kept"] for entry in server.lethe()["kept"]}
    server.check_healthy()
    server.stop()
    return texts, kept


@pytest.fixture(scope="module")
def portable(start):
    return serve(start, "torch_native")


@pytest.fixture(scope="module")
def interpreted(start):
    return serve(start, "triton", TRITON_INTERPRET="1")


def test_replies_are_those_of_the_portable_backend(portable, interpreted):
    assert interpreted[0] == portable[0]


def test_every_round_kept_the_same_tokens(portable, interpreted):
    assert len(portable[1]) >= 3 * len(PROMPTS)
    assert interpreted[1] == portable[1]
