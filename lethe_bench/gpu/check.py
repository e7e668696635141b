"""Whole servers on every backend, with each cell that attention reads compared: ``python -m lethe_bench.gpu.check``.

The bundled reasoner answers on servers that keep a copy of what has been computed (``debug.shadow``) and check SGLang's
memory in every step. They run side by side on one GPU, each with a small pool. What is looked for is what a double on a
CPU cannot show: compiled kernels, streams, CUDA graphs and the backends' own libraries.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from lethe_bench.accuracy.prompts import Prompts
from lethe_bench.gpu.base import OUT, failure
from lethe_bench.gpu.greedy import ask
from lethe_bench.gpu.settings import EVICTION, MODEL, problems
from lethe_bench.servers import Server, ServerError, explained, launch_command, tail
from lethe_sglang.files import write_atomically
from lethe_sglang.processes import ending_on_signals

STRICT = {
    "HF_HUB_OFFLINE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
COMMON = (
    *("--dtype", "bfloat16", "--max-total-tokens", "16384", "--max-running-requests", "32", "--context-length", "2048"),
    *("--cuda-graph-max-bs-decode", "32", "--disable-prefill-cuda-graph", "--mem-fraction-static", "0.8"),
)
"""Of every server; the fraction bounds the pool only, and the pool is named."""

LAYERS = {"allocation": "list", "layers": [60, 100, 72, 88, 64, 96]}
"""Per-layer budgets, where they are wanted."""

EVERY = 8
"""One of so many problems is asked."""

BAD = ("Mem Leak", "memory leak", "double free", "Traceback", "stale")
"""What a healthy server never logs."""


def _lethe(*arguments: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    shadow = {"debug": {"shadow": True}} if "--disable-cuda-graph" in arguments else {}
    return arguments, {**EVICTION, **shadow, **options}


FLASHINFER, TRITON = ("--attention-backend", "flashinfer"), ("--attention-backend", "triton")
EAGER = ("--disable-cuda-graph",)
EVERY_4 = {"half_life": 64, "score_every": 4}

ARMS: dict[str, tuple[tuple[str, ...], dict[str, Any] | None]] = {
    "stock": ((), None),
    "default": _lethe(),
    "default-eager": _lethe(*EAGER),
    "page-16": _lethe("--page-size", "16"),
    "page-16-eager": _lethe("--page-size", "16", *EAGER),
    "every-4": _lethe(lethe=EVERY_4),
    "flashinfer": _lethe(*FLASHINFER),
    "flashinfer-eager": _lethe(*FLASHINFER, *EAGER),
    "flashinfer-layers": _lethe(*FLASHINFER, budget=LAYERS),
    "flashinfer-layers-eager": _lethe(*FLASHINFER, *EAGER, budget=LAYERS),
    "flashinfer-every-4": _lethe(*FLASHINFER, lethe=EVERY_4),
    "flashinfer-fp8": _lethe(*FLASHINFER, "--kv-cache-dtype", "fp8_e4m3"),
    "triton": _lethe(*TRITON),
    "triton-eager": _lethe(*TRITON, *EAGER),
    "triton-layers": _lethe(*TRITON, budget=LAYERS),
    "triton-layers-eager": _lethe(*TRITON, *EAGER, budget=LAYERS),
}
"""Name -> arguments of the server, and its configuration of eviction."""


def command(arm: str, port: int) -> list[str]:
    """Return the command line of an arm's server."""
    arguments, options = ARMS[arm]
    own = [*COMMON, *arguments]
    if options is not None:
        own += ["--kv-evict", "lethe", "--kv-evict-config", json.dumps(options)]
    return launch_command(str(MODEL), port, *own)


def check(arm: str, port: int, folder: Path, ready_within: float, prompts: Prompts) -> dict[str, Any]:
    """Ask an arm's server alone and together, and return what it found and how it went."""
    server = Server(command(arm, port), port, folder / f"{arm}.log", STRICT)
    server.ready_within = ready_within
    try:
        with explained(server), server:
            return {"arm": arm, **_asked(server, prompts, ARMS[arm][1] is not None)}
    except ServerError as error:
        return {"arm": arm, **failure(str(error))}


def _asked(server: Server, prompts: Prompts, evicts: bool) -> dict[str, Any]:
    items = problems()[::EVERY]
    encoded = [prompts.encode(item.prompt) for item in items]
    together = ask(server, len(encoded), encoded)
    alone = ask(server, 1, encoded[:3])
    time.sleep(1)
    server.post("/flush_cache?timeout=30", {})
    info = server.get("/server_info")
    state = info["internal_states"][0].get("lethe") or {}
    right = [item.grade(reply["text"].removesuffix(prompts.end)) for item, reply in zip(items, together, strict=True)]
    log = server.log.read_text(errors="replace")
    found = [bad for bad in BAD if bad in log]
    if server.status is not None or found:
        raise ServerError(f"the log says {found}:\n{tail(server.log)}")
    if evicts and not state.get("rounds"):
        raise ServerError("no round was run")
    return {
        "status": "measured",
        "backend": info.get("attention_backend"),
        "ready_seconds": round(server.ready_seconds, 1),
        "right": sum(right),
        "replies": len(right),
        "as_alone": sum(a["output_ids"] == b["output_ids"] for a, b in zip(alone, together, strict=False)),
        "rounds": state.get("rounds"),
        "shadow": state.get("shadow"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Check arms side by side, print a JSON line each, and return 0 if all went well."""
    parser = argparse.ArgumentParser(prog="python -m lethe_bench.gpu.check", description=__doc__.splitlines()[0])
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"which (all): {', '.join(ARMS)}")
    parser.add_argument("--out", type=Path, default=OUT / "check", help="folder of the logs and of check.json")
    parser.add_argument("--ready-within", type=float, default=300, help="seconds that a server may take to start")
    args = parser.parse_args(argv)
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"{', '.join(sorted(unknown))}: no such arm; take some of {', '.join(ARMS)}")
    arms = args.arms or list(ARMS)
    args.out.mkdir(parents=True, exist_ok=True)
    prompts, found = Prompts(str(MODEL)), []
    with ending_on_signals(), ThreadPoolExecutor(len(arms)) as pool:
        waiting = [
            pool.submit(check, arm, 31100 + 20 * n, args.out, args.ready_within, prompts) for n, arm in enumerate(arms)
        ]
        for one in as_completed(waiting):  # a run that is cut keeps what is there
            found.append(one.result())
            print(json.dumps(found[-1]), flush=True)
            write_atomically(args.out / "check.json", json.dumps(found, indent=1) + "\n")
    return 0 if all(record["status"] == "measured" for record in found) else 1


if __name__ == "__main__":
    sys.exit(main())
