"""Serve the bundled model with KV eviction, ask it one long question, show what happened to its KV cache."""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openai import OpenAI

from lethe_bench.servers import Server, ServerError, port_free

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "out" / "quickstart.log"
RING, START, STEPS = "kteiomrbzy", "e", 57  # a walk round ten nodes; the chain is 284 tokens
QUESTION = ";".join(f"{node}{after.upper()}" for node, after in sorted(zip(RING, RING[1:] + RING[0], strict=True)))
QUESTION += f";?{START.upper()}0#{STEPS}"
RIGHT_ANSWER = RING[(RING.index(START) + STEPS) % len(RING)].upper()


@contextlib.contextmanager
def serving(port: int) -> Iterator[Server]:
    """Start the server and yield it once it is ready; on leaving, end all of its processes."""
    if not port_free(port):
        sys.exit(f"error: port {port} is in use; choose another with --port")
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(ROOT / "models" / "reasoner")]
    command += ["--port", str(port), "--kv-evict", "lethe", "--kv-evict-config", "cpu-demo"]
    print(f"starting  {' '.join(command[1:])}\n          (about a minute; log: {LOG})", flush=True)
    LOG.parent.mkdir(exist_ok=True)
    try:
        with Server(command, port, LOG) as server:
            yield server
    except ServerError as error:
        sys.exit(f"error: {error}\nthe whole log is {LOG}")


def ask(url: str) -> tuple[str, str]:
    """Stream the model's reasoning to the terminal; return the request's id and the answer that ends it."""
    messages: Any = [{"role": "user", "content": QUESTION}]
    client = OpenAI(base_url=f"{url}/v1", api_key="unused")
    stream = client.chat.completions.create(
        model="reasoner", messages=messages, temperature=0, max_tokens=600, stream=True
    )
    rid = text = ""
    for chunk in stream:
        rid, piece = chunk.id, chunk.choices[0].delta.content or ""
        text += piece
        print(piece, end="", flush=True)
    return rid, text.rpartition("</think>")[2]


def eviction(server: Server, rid: str) -> dict[str, Any]:
    """Return the server's eviction statistics once they include the end of request `rid`."""
    for _ in range(20):
        stats: dict[str, Any] = server.get("/server_info")["internal_states"][0]["lethe"]
        if (stats["last_finished"] or {}).get("rid") == rid:
            return stats
        time.sleep(0.25)
    sys.exit(f"error: the server reports no statistics for request {rid}: {stats}")


def main() -> int:
    """Run the quickstart; the exit status tells whether the answer was right."""
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop the server after the answer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome to FILE")
    parser.add_argument("--port", type=int, default=30000)
    args = parser.parse_args()
    os.environ["NO_PROXY"] = "127.0.0.1"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda caught, _: sys.exit(128 + caught))
    with serving(args.port) as server:
        print(f"question  {QUESTION}  (where does a walk of {STEPS} steps from {START} end?)\nreasoning ", end="")
        rid, answer = ask(server.url)
        stats = eviction(server, rid)
        last, correct = stats["last_finished"], answer == RIGHT_ANSWER
        print(f"\nanswer    {answer} ({'right' if correct else f'wrong: it is {RIGHT_ANSWER}'})\n")
        print(
            f"KV cache  {stats['policy']}: {stats['budget_tokens']} tokens per layer, a round every {stats['interval']}"
        )
        print(f"          {last['rounds']} rounds evicted {last['evicted_per_layer']} tokens per layer")
        print(f"          {last['held_peak']} blocks held at most; stock holds {last['stock_peak']}")
        if args.json:
            outcome = {
                "answer_correct": correct,
                "rounds": last["rounds"],
                "blocks_held_peak": last["held_peak"],
                "blocks_stock_peak": last["stock_peak"],
                "sglang": version("sglang"),
            }
            args.json.write_text(json.dumps(outcome) + "\n")
        if not args.once:
            body = json.dumps({"messages": [{"role": "user", "content": "a.a'7;cAc'5;bCb'2;?#02b#01c"}]})
            print(f"\nStill serving; Ctrl-C stops it. Try:\n  curl {server.url}/v1/chat/completions \\")
            print(f"    -H 'Content-Type: application/json' -d '{body}'", flush=True)
            signal.pause()
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
