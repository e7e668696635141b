"""Greedy replies of one server: asked for at a concurrency, and kept as digests."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from gpu_suite.settings import LONGEST, MODEL, problems

if TYPE_CHECKING:
    from lethe_sglang.evaluation.datasets import Item
    from lethe_sglang.evaluation.servers import Server


class Asked(NamedTuple):
    """A problem's prompt as token ids, and whether a reply (with its end token) is right."""

    prompt: list[int]
    right: Callable[[str], bool]


def questions() -> list[Asked]:
    """Return the problems as they are sent."""
    from lethe_sglang.evaluation.eval_run import Prompts

    prompts = Prompts(str(MODEL))

    def marked(item: Item) -> Callable[[str], bool]:
        return lambda text: item.grade(text.removesuffix(prompts.end))

    return [Asked(prompts.encode(item.prompt), marked(item)) for item in problems()]


def ask_all(server: Server, evicts: bool, concurrency: int, asked: Sequence[Asked]) -> dict[str, Any]:
    """Ask problems, ``concurrency`` of them at a time.

    Returns
    -------
    dict
        A digest of each reply's token ids, in the order of the problems; tokens of all replies, how many are right;
        rounds; requests in the batch at most, and retracted; seconds.

    Raises
    ------
    ServerError
        If the server gives up a reply, evicts and should not, or should and does not.
    """
    from lethe_sglang.evaluation.bench import parse_log
    from lethe_sglang.evaluation.servers import ServerError

    server.post("/flush_cache?timeout=60", {})
    before, offset, began = rounds_of(server, evicts), server.log.stat().st_size, time.monotonic()
    replies = ask(server, concurrency, [one.prompt for one in asked])
    seconds, rounds = time.monotonic() - began, rounds_of(server, evicts) - before
    if lost := [reply for reply in replies if reply["meta_info"]["finish_reason"]["type"] not in ("stop", "length")]:
        raise ServerError(f"the server gave {len(lost)} replies up: {lost[0]['meta_info']['finish_reason']}")
    if evicts and not rounds:
        raise ServerError("no round was run, so nothing was evicted")
    held = parse_log(server.log.read_bytes()[offset:].decode(errors="replace"))
    return {
        "replies": " ".join(digest(reply["output_ids"]) for reply in replies),
        "tokens": sum(len(reply["output_ids"]) for reply in replies),
        "right": sum(one.right(reply["text"]) for one, reply in zip(asked, replies, strict=True)),
        "rounds": rounds,
        "running_peak": held.running_peak,
        "retracted_requests": held.retracted_requests,
        "seconds": seconds,
    }


def ask(server: Server, concurrency: int, prompts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Return the greedy replies to prompts (token ids) in their order, ``concurrency`` of them open at a time."""
    sampling = {"temperature": 0, "max_new_tokens": LONGEST, "skip_special_tokens": False}

    def one(prompt: Sequence[int]) -> dict[str, Any]:
        return dict(json.loads(server.post("/generate", {"input_ids": prompt, "sampling_params": sampling})))

    pool = ThreadPoolExecutor(concurrency)
    try:
        return list(pool.map(one, prompts))
    finally:  # at an alarm the threads end with the server
        pool.shutdown(wait=False, cancel_futures=True)


def digest(ids: Sequence[int]) -> str:
    """Return what tells one reply from another: 12 hexadecimal digits of its token ids."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:12]


def rounds_of(server: Server, evicts: bool) -> int:
    """Return how many rounds a server has run, 0 for stock.

    Raises
    ------
    ServerError
        If it evicts and should not, or should and does not.
    """
    from lethe_sglang.evaluation.servers import ServerError

    state = server.get("/server_info")["internal_states"][0].get("lethe")
    if (state is not None) != evicts:
        raise ServerError(f"the server {'does not report eviction' if evicts else 'evicts'}")
    return int(state["rounds"]) if evicts else 0


def joined(old: dict[str, Any], found: dict[str, Any], planned: int) -> dict[str, Any]:
    """Join what :func:`ask_all` found to the record of a pass so far, empty at first; ``planned`` replies make it."""
    record = dict(found)
    if old:
        record["replies"] = f"{old['replies']} {found['replies']}"
        record["running_peak"] = max(old["running_peak"], found["running_peak"])
        record |= {name: old[name] + found[name] for name in _SUMS}
    done = len(record["replies"].split())
    if done < planned:
        return {"status": "partial", "message": f"{done} of {planned} replies", **record}
    return {"status": "measured", **record}


_SUMS = ("tokens", "right", "rounds", "retracted_requests", "seconds")
