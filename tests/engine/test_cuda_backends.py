"""The whole server with the CUDA backends on a CPU, against the portable backend.

Scheduler, overlap, radix tree, rounds, SGLang's backends and ours, and their plans are the real ones; all Triton
kernels, SGLang's and ours, run under Triton's interpreter, and FlashInfer's wrappers are those of
``flashinfer_on_cpu``. The Triton server replays its steps of one request (``graphs_on_cpu``; FlashInfer's are in
``test_cuda_graphs.py``). What a GPU adds is the compiler, FlashInfer's kernels and streams.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import config
from problems import CHAINS

SETTINGS = config(
    budget={"allocation": "list", "layers": [10, 16, 12, 19]},
    rounds={"interval": 8},
    lethe={"half_life": 7},
    retain={"recent_ratio": 0.3},
    debug={"record_kept": True, "shadow": True},
)
PROMPTS = CHAINS[:2]
TOKENS = (26, 48)
"""So that the last steps are of one request, which is replayed where there are graphs."""
HERE = Path(__file__).parent
ENVIRONMENT = {
    "torch_native": {},
    "triton": {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE / "graphs_on_cpu")},
    "flashinfer": {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE / "flashinfer_on_cpu")},
}


def serve(start, backend):
    """Run all prompts at once; return texts, what every round kept, per request, and how many cells were compared.

    Then once more with rounds only when the pool is short, and return what the server says of that.
    """
    server = start(
        "--max-total-tokens",
        "216",  # what is asked for under pressure does not fit
        "--max-running-requests",
        "4",
        "--attention-backend",
        backend,
        "--triton-attention-num-kv-splits",  # the interpreter runs empty ones too, as it does for this length:
        "2",
        "--context-length",
        "240",  # one program a request fills its list
        "--page-size",
        "8",
        "--kv-evict",
        "lethe",
        "--kv-evict-config",
        SETTINGS,
        *(("--cuda-graph-bs-decode", "1") if backend == "triton" else ()),
        env=ENVIRONMENT[backend],
    ).wait()

    def ask(number, tokens=None):
        sampling = {"temperature": 0, "max_new_tokens": tokens or TOKENS[number], "ignore_eos": True}
        body = {"text": PROMPTS[number], "rid": f"r{number}", "sampling_params": sampling}
        return server.post("/generate", body)["text"]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        texts = list(pool.map(ask, range(len(PROMPTS))))
    report = server.lethe()
    kept = {(entry["rid"], entry["round"]): entry["kept"] for entry in report["kept"]}
    server.check_healthy()
    server.post("/kv_evict", {"rounds": {"when": "pressure"}})
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        list(pool.map(ask, range(len(PROMPTS)), (52, 52)))
    pressed = server.lethe()
    server.check_healthy()
    server.stop()
    return texts, kept, report["shadow"]["cells"], (report, pressed)


@pytest.fixture(scope="module")
def portable(start):
    return serve(start, "torch_native")


@pytest.fixture(scope="module", params=["triton", "flashinfer"])
def interpreted(start, request):
    return serve(start, request.param)


@pytest.mark.proves("attention backends flashinfer and triton, CUDA graphs")
def test_replies_are_those_of_the_portable_backend(portable, interpreted):
    assert interpreted[0] == portable[0]


def test_every_round_kept_the_same_tokens(portable, interpreted):
    assert len(portable[1]) >= 5
    assert interpreted[1] == portable[1]


@pytest.mark.proves("attention backends flashinfer and triton, CUDA graphs")
def test_every_cell_that_a_kernel_read_was_the_uncompressed_one(portable, interpreted):
    assert min(portable[2], interpreted[2]) >= 15_000


def test_a_full_pool_is_shared_whatever_the_backend(interpreted):
    """Under pressure nobody is pruned before the pool is short; what is read then is compared cell by cell."""
    before, after = interpreted[3]
    assert after["pressure"]["events"] >= 1 and after["rounds"] > before["rounds"], after["pressure"]
    assert after["requests_retracted"] == before["requests_retracted"] == 0
    assert after["pressure"]["share"] >= after["budget_tokens"]
    assert after["shadow"]["cells"] - before["shadow"]["cells"] > before["shadow"]["cells"], "full lists were compared"
