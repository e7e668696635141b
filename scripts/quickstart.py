"""Serve a small model with KV eviction, ask it one question, show what happened to its KV cache and to its reply."""

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
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from lethe_bench import models
from lethe_bench.cli.checks import check_ports, say
from lethe_bench.cli.options import integer
from lethe_bench.fidelity import trajectory
from lethe_bench.servers import Server, ServerError, explained, launch_command
from lethe_sglang.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "out" / "quickstart.log"
MODEL = "smollm2"
ENGLISH = "How does bread get from a field of wheat to the table? Describe every step in detail."
RING, START, STEPS = "kteiomrbzy", "e", 57  # a walk round ten nodes; the chain is 284 tokens
WALK = ";".join(f"{node}{after.upper()}" for node, after in sorted(zip(RING, RING[1:] + RING[0], strict=True)))
WALK += f";?{START.upper()}0#{STEPS}"
RIGHT_ANSWER = RING[(RING.index(START) + STEPS) % len(RING)].upper()


class Task(NamedTuple):
    """What is asked of which model.

    Attributes
    ----------
    model
        Its directory.
    question
        What a user says; nothing else is in the chat.
    tokens
        Longest reply.
    sampling
        How it is sampled: at a temperature at which it can be compared with a prefill.
    options
        Options of the server: how it evicts.
    another
        A question to try by hand.
    """

    model: Path
    question: str
    tokens: int
    sampling: dict[str, float]
    options: list[str]
    another: str


def english(tokens: int) -> Task:
    """Return a question in English, whose reply may keep a quarter of its own tokens.

    Raises
    ------
    ConfigError
        If the model cannot be had.
    """
    rounds = json.dumps({"rounds": {"interval": tokens // 16}})
    options = ["--kv-evict-budget", str(tokens // 4), "--kv-evict-config", rounds]
    sampling = {"temperature": 1, "top_p": 0.7}  # its likeliest words go round in circles
    return Task(models.directory(MODEL, say), ENGLISH, tokens, sampling, options, "Why is the sky blue?")


def toy() -> Task:
    """Return a problem with an answer that can be checked, for a model that comes with the repository."""
    options = ["--kv-evict-config", "cpu-demo"]
    return Task(ROOT / "models" / "reasoner", WALK, 600, {"temperature": 0}, options, "a.a'7;cAc'5;bCb'2;?#02b#01c")


def chosen(args: argparse.Namespace) -> tuple[Task, bool]:
    """Return the task, and whether it is the toy's: when it was asked for, or the other model cannot be had."""
    if not args.toy:
        try:
            return english(args.tokens or 600), False
        except ConfigError as error:
            print(f"{error}; taking the toy instead, as with --toy", flush=True)
    return toy(), True


@contextlib.contextmanager
def serving(task: Task, port: int) -> Iterator[Server]:
    """Start the server and yield it once it is ready; on leaving, end all of its processes."""
    shared = ["--max-total-tokens", "8192", "--random-seed", "0"]
    command = launch_command(str(task.model), port, "--kv-evict", "lethe", *task.options, *shared)
    print(f"starting  {' '.join(command[1:])}\n          (about a minute; log: {LOG})", flush=True)
    LOG.parent.mkdir(exist_ok=True)
    try:
        with Server(command, port, LOG) as server, explained(server):
            yield server
    except ServerError as error:
        sys.exit(f"error: {error}\nthe whole log is {LOG}")


def tokenized(task: Task) -> list[int]:
    """Return the token ids of a chat that holds the question."""
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    chat = [{"role": "user", "content": task.question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False))


def ask(server: Server, task: Task, prompt: list[int]) -> dict[str, Any]:
    """Stream the reply to the terminal; return all of it, with log-probabilities."""
    sampling = {**task.sampling, "max_new_tokens": task.tokens}
    body = {"input_ids": prompt, "sampling_params": sampling, "stream": True, **trajectory.ASKED}
    reply: dict[str, Any] = {"text": ""}
    for event in server.stream("/generate", body):
        if "error" in event:
            raise ServerError(str(event["error"]))
        print(event["text"][len(reply["text"]) :], end="", flush=True)
        reply = event
    return reply


def eviction(server: Server, rid: str) -> dict[str, Any]:
    """Return the server's eviction statistics once they include the end of request `rid`."""
    for _ in range(20):
        stats: dict[str, Any] = server.get("/server_info")["internal_states"][0]["lethe"]
        if (stats["last_finished"] or {}).get("rid") == rid:
            return stats
        time.sleep(0.25)
    sys.exit(f"error: the server reports no statistics for request {rid}: {stats}")


def show_eviction(stats: dict[str, Any]) -> dict[str, Any]:
    """Print what a request's cache went through; return its part of the outcome."""
    last = stats["last_finished"]
    evicted = last["evicted_per_layer"]
    same = len(set(evicted)) == 1
    print(f"KV cache  {stats['policy']}: {stats['budget_tokens']} tokens per layer, a round every {stats['interval']}")
    print(f"          {last['rounds']} rounds evicted {evicted[0] if same else evicted} tokens per layer")
    print(f"          {last['held_peak']} blocks held at most; stock holds {last['stock_peak']}")
    peaks = {"blocks_held_peak": last["held_peak"], "blocks_stock_peak": last["stock_peak"]}
    return {"rounds": last["rounds"], **peaks}


def show_fidelity(server: Server, prompt: list[int], reply: dict[str, Any], skip: int) -> dict[str, float]:
    """Ask the full cache what it makes of the reply, print it and return it; `skip` tokens came before any round."""
    steps = trajectory.measured(server, prompt, reply)
    counted = steps[skip:] if len(steps) > skip else steps
    agreement, k3 = (float(counted[:, column].mean()) for column in (trajectory.AGREEMENT, trajectory.K3))
    print(f"fidelity  the full cache has the same first choice at {agreement:.0%} of the last {len(counted)} tokens,")
    print(f"          and is {k3:.3f} nats a token away (k3, by one prefill of the reply)")
    return {"agreement": agreement, "k3": k3}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--once", action="store_true", help="stop the server after the answer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome to FILE")
    parser.add_argument("--port", type=integer(1, 65535), default=30000)
    parser.add_argument("--toy", action="store_true", help="a toy that reasons, and whose answer can be checked")
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=integer(64, 4096),
        help="longest reply in English; a quarter of that is kept (default: 600)",
    )
    args = parser.parse_args(given)
    if args.toy and args.tokens:
        parser.error("--tokens goes with the question in English; leave it or --toy out")
    return args


def main() -> int:
    """Run the quickstart; the exit status tells whether the toy's answer was right."""
    args = arguments()
    os.environ["NO_PROXY"] = "127.0.0.1"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda caught, _: sys.exit(128 + caught))
    try:
        check_ports(args.port)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    task, is_toy = chosen(args)
    prompt, correct = tokenized(task), True
    with serving(task, args.port) as server:
        explained_as = f"  (where does a walk of {STEPS} steps from {START} end?)" if is_toy else ""
        print(f"question  {task.question}{explained_as}\n{'reasoning' if is_toy else 'reply    '} ", end="")
        reply = ask(server, task, prompt)
        stats = eviction(server, reply["meta_info"]["id"])
        if is_toy:
            answer = reply["text"].rpartition("</think>")[2]
            correct = answer == RIGHT_ANSWER
            print(f"\nanswer    {answer} ({'right' if correct else f'wrong: it is {RIGHT_ANSWER}'})\n")
            outcome = {"answer_correct": correct, **show_eviction(stats)}
        else:
            print("\n")
            outcome = {"model": MODEL, **show_eviction(stats)}
            outcome |= show_fidelity(server, prompt, reply, stats["budget_tokens"])
        if args.json:
            args.json.write_text(json.dumps({**outcome, "sglang": version("sglang")}) + "\n")
        if not args.once:
            body = json.dumps({"messages": [{"role": "user", "content": task.another}]})
            print(f"\nStill serving; Ctrl-C stops it. Try:\n  curl {server.url}/v1/chat/completions \\")
            print(f"    -H 'Content-Type: application/json' -d '{body}'", flush=True)
            signal.pause()
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
