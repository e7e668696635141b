"""Serve the bundled model with KV eviction, ask it one long question, show what happened to its KV cache."""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openai import OpenAI

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "out" / "quickstart.log"
READY_TIMEOUT_S = 600  # a first start on a GPU compiles kernels
CYCLE, START, STEPS = "kteiomrbzy", "e", 50  # the walk asked for: ten nodes in a ring; its chain is 303 tokens


def question() -> tuple[str, str]:
    """Return the walk in the words of ``models/reasoner-dev/README.md``, and the node it ends on."""
    ring = dict(zip(CYCLE, CYCLE[1:] + CYCLE[:1], strict=True))
    end = START
    for _ in range(STEPS):
        end = ring[end]
    return ";".join(f"{node}>{ring[node]}" for node in sorted(ring)) + f";?{START}{STEPS}", end


@contextlib.contextmanager
def serving(port: int) -> Iterator[str]:
    """Start the server and yield its address once it is ready; on leaving, end all of its processes."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            sys.exit(f"error: port {port} is in use; choose another with --port")
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(ROOT / "models" / "reasoner-dev")]
    command += ["--port", str(port), "--kv-evict", "lethe", "--kv-evict-config", "cpu-demo"]
    print(f"starting  {' '.join(command[1:])}\n          (about a minute; log: {LOG})", flush=True)
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        try:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # what outlived the launcher


def wait_until_ready(server: "subprocess.Popen[bytes]", health: str) -> None:
    """Return once the server is healthy; exit with the tail of its log if it dies or takes too long."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=10):
            return
        time.sleep(0.5)
    tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-30:])
    sys.exit(f"{tail}\n\nerror: the server did not start; its whole log is {LOG}")


def ask(url: str, problem: str) -> tuple[str, str]:
    """Stream the model's chain to the terminal; return the request's id and the answer at the end of the chain."""
    client = OpenAI(base_url=f"{url}/v1", api_key="unused")
    messages: Any = [{"role": "user", "content": problem}]
    chain, rid = "", ""
    for chunk in client.chat.completions.create(
        model="reasoner-dev", messages=messages, temperature=0, max_tokens=600, stream=True
    ):
        rid, piece = chunk.id, (chunk.choices[0].delta.content or "") if chunk.choices else ""
        chain += piece
        print(piece, end="", flush=True)
    print()
    return rid, chain.rpartition(".")[2]


def eviction(url: str, rid: str) -> dict[str, Any]:
    """Return the server's eviction statistics, as of the end of request `rid`."""
    for _ in range(20):
        with urllib.request.urlopen(f"{url}/server_info", timeout=30) as reply:
            stats: dict[str, Any] = json.load(reply)["internal_states"][0]["lethe"]
        if (stats["last_finished"] or {}).get("rid") == rid:
            return stats
        time.sleep(0.25)
    sys.exit(f"error: the server reports no statistics for request {rid}: {stats}")


def main() -> int:
    """Run the quickstart; the exit status tells whether the model's answer was right."""
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop the server after the answer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome to FILE")
    parser.add_argument("--port", type=int, default=30000)
    args = parser.parse_args()
    os.environ["NO_PROXY"] = "127.0.0.1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    problem, right_answer = question()
    with serving(args.port) as url:
        print(f"question  {problem}\n          (after {STEPS} steps from {START}, which node?)\nreasoning ", end="")
        rid, answer = ask(url, problem)
        stats = eviction(url, rid)
        last, correct = stats["last_finished"], answer == right_answer
        print(f"answer    {answer} ({'right' if correct else f'wrong: it is {right_answer}'})\n")
        print(f"KV cache  policy {stats['policy']}, {stats['layers']} tokens per layer, a round every {stats['interval']}")
        print(f"          {last['rounds']} rounds evicted {last['evicted_per_layer']} tokens per layer")
        print(f"          {last['blocks_held_peak']} blocks held at most; stock SGLang holds {last['blocks_stock_peak']}")
        outcome = {
            "answer_correct": correct,
            "rounds": last["rounds"],
            "blocks_held_peak": last["blocks_held_peak"],
            "blocks_stock_peak": last["blocks_stock_peak"],
            "sglang": version("sglang"),
        }
        if args.json:
            args.json.write_text(json.dumps(outcome) + "\n")
        if not args.once:
            body = json.dumps({"model": "reasoner-dev", "messages": [{"role": "user", "content": "c=a+5;a=7;?c"}]})
            print(f"\nStill serving (Ctrl-C stops it). Try:\n  curl {url}/v1/chat/completions \\")
            print(f"    -H 'Content-Type: application/json' -d '{body}'", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
