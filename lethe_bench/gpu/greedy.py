"""Part ``greedy``: how many greedy replies differ without CUDA graphs, without overlap, and at other concurrencies.

The bundled reasoner answers. In SGLang's deterministic mode a reply may depend on none of these (on FlashInfer the mode
switches the prefix cache off, so prompts are private then). Outside it stock's replies differ, too, so lethe is set
beside stock on the same backend.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from lethe_bench.accuracy.prompts import Prompts
from lethe_bench.gpu.base import Part, in_a_cell, rounds_of, serving
from lethe_bench.gpu.settings import (
    CONCURRENCIES,
    LONGEST,
    MODEL,
    MODES,
    STOCK,
    compare,
    pairs,
    problems,
    settings,
)
from lethe_bench.servers import Server, ServerError
from lethe_bench.throughput.measure import parse_log
from lethe_sglang.config import ConfigError


class Greedy(Part):
    """Every server, each asked the same problems at every concurrency."""

    name: ClassVar[str] = "greedy"

    def listing(self, model: str | None = None) -> dict[str, str]:
        """See the base class; there is one model."""
        return {setting.name: setting.readable() for setting in settings()}

    def measure(self, key: str) -> dict[str, Any]:
        """See the base class."""
        if not (MODEL / "config.json").is_file():
            raise ConfigError(f"greedy: needs {MODEL} of a checkout of this project; run it there")
        setting = {setting.name: setting for setting in settings()}[key]
        prompts = Prompts(str(MODEL))
        with serving(setting.command()) as server:
            passes = {str(n): ask_all(server, setting.evicts, n, prompts) for n in CONCURRENCIES}
        return {"status": "measured", "passes": passes}

    def table(self, records: dict[str, Any]) -> list[str]:
        """See the base class."""
        arms = (*STOCK, *STOCK.values())
        rows = [f"| replies that differ | {' | '.join(arms)} |", f"| --- |{' ---: |' * len(arms)}"]
        for mode in MODES:
            found = {(arm, c.pair.label): f"{c.differ} of {c.of}" for arm in arms for c in compare(records, mode, arm)}
            for pair in pairs(mode, arms[0]):
                cells = " | ".join(found.get((arm, pair.label), "-") for arm in arms)
                rows.append(f"| {mode}: {pair.label} | {cells} |")
        rows += [
            "",
            "| pass | replies | right | tokens a reply | requests at once, at most | requests retracted | "
            "rounds | seconds |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for key, record in records.items():
            if record["status"] != "measured":
                rows.append(f"| {key} | {in_a_cell(record)} | | | | | | |")
            for n, r in record.get("passes", {}).items():
                count = len(r["replies"])
                numbers = f"{r['tokens'] / count:.0f} | {r['running_peak']} | {r['retracted_requests']} | {r['rounds']}"
                rows.append(f"| {key} at {n} | {count} | {r['right']} | {numbers} | {r['seconds']:.1f} |")
        return rows


def ask_all(server: Server, evicts: bool, concurrency: int, prompts: Prompts) -> dict[str, Any]:
    """Ask all problems, ``concurrency`` of them at a time.

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
    items = problems()
    server.post("/flush_cache?timeout=60", {})
    before, offset, began = rounds_of(server, evicts), server.log.stat().st_size, time.monotonic()
    replies = ask(server, concurrency, [prompts.encode(item.prompt) for item in items])
    seconds, rounds = time.monotonic() - began, rounds_of(server, evicts) - before
    if lost := [reply for reply in replies if reply["meta_info"]["finish_reason"]["type"] not in ("stop", "length")]:
        raise ServerError(f"the server gave {len(lost)} replies up: {lost[0]['meta_info']['finish_reason']}")
    if evicts and not rounds:
        raise ServerError("no round was run, so nothing was evicted")
    held = parse_log(server.log.read_bytes()[offset:].decode(errors="replace"))
    right = [item.grade(reply["text"].removesuffix(prompts.end)) for item, reply in zip(items, replies, strict=True)]
    return {
        "replies": [digest(reply["output_ids"]) for reply in replies],
        "tokens": sum(len(reply["output_ids"]) for reply in replies),
        "right": sum(right),
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
    finally:  # at Ctrl-C the threads end with the server
        pool.shutdown(wait=False, cancel_futures=True)


def digest(ids: Sequence[int]) -> str:
    """Return what tells one reply from another: 12 hexadecimal digits of its token ids."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:12]
