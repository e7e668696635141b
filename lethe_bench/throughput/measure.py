"""Throughput and memory against stock SGLang: real servers one after the other, one model, one pool, one workload.

Every repeat measures each arm once, on a fresh server, before the next repeat begins. The prompts of all arms are the
same token ids (one seed), every request generates the same number of tokens, and what the servers hold is read from
their log, which has one line per decode step.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lethe_bench.machine import CpuMeter
from lethe_bench.servers import Server, ServerError, explained, run_client, tail
from lethe_bench.throughput.plan import Arms, Plan

DECODE = re.compile(r"Decode batch.*?#running-req: (\d+),.*?#(?:full )?token: (\d+)")
_RETRACTION = re.compile(r"Retract requests\..*?#retracted_reqs: (\d+)")
SERVER_FACTS = (
    "device",
    "dtype",
    "kv_cache_dtype",
    "attention_backend",
    "tp_size",
    "page_size",
    "chunked_prefill_size",
    "schedule_policy",
    "schedule_conservativeness",
    "disable_radix_cache",
    "disable_overlap_schedule",
    "max_running_requests",
    "max_total_num_tokens",
)
_TIMES = ("_ms", "_throughput", "_tokens", "duration", "concurrency")
_COUNTERS = ("rounds", "round_launches", "round_seconds", "requests_pruned", "requests_retracted", "blocks_freed_total")
_LEVELS = ("policy", "budget_tokens", "interval", "recent", "layers", "held_peak_request", "auxiliary_bytes")


@dataclass(frozen=True)
class Held:
    """What a server held, over the decode steps of one measurement.

    Attributes
    ----------
    decode_steps
        Decode steps.
    running_mean, running_peak
        Requests in the batch.
    tokens_mean, tokens_peak
        Slots of the KV pool that requests hold (what only the prefix cache holds is not counted).
    retractions, retracted_requests
        How often the pool ran full, and how many requests lost their cache and started again.
    """

    decode_steps: int
    running_mean: float
    running_peak: int
    tokens_mean: float
    tokens_peak: int
    retractions: int
    retracted_requests: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One arm, once.

    Attributes
    ----------
    arm, repeat
        Which arm; repeats count from 1.
    times
        Throughputs (requests, tokens per second), ``duration`` (s) and latencies (ms) as SGLang's client names them.
    held
        What the server held.
    lethe
        What the plugin counted during the measurement; None for stock.
    server
        Arguments of the server that its defaults decided.
    ready_seconds
        Start of the server.
    others_cpu
        Share of the machine's CPU time that other processes took meanwhile, in [0, 1]: how far to trust ``times``.
    """

    arm: str
    repeat: int
    times: dict[str, float]
    held: Held
    lethe: dict[str, Any] | None
    server: dict[str, Any]
    ready_seconds: float
    others_cpu: float


def parse_log(text: str) -> Held:
    """Read what a server held from its log, in which every decode step has a line.

    Raises
    ------
    ServerError
        If the log has no decode line.
    """
    steps = [(int(running), int(tokens)) for running, tokens in DECODE.findall(text)]
    if not steps:
        raise ServerError("the server's log has no decode line; nothing was generated")
    running, tokens = zip(*steps, strict=True)
    retracted = [int(count) for count in _RETRACTION.findall(text)]
    return Held(
        decode_steps=len(steps),
        running_mean=sum(running) / len(steps),
        running_peak=max(running),
        tokens_mean=sum(tokens) / len(steps),
        tokens_peak=max(tokens),
        retractions=len(retracted),
        retracted_requests=sum(retracted),
    )


def run(plan: Plan, say: Callable[[str], None]) -> Iterator[Measurement]:
    """Measure every arm in every repeat, interleaved, and yield each measurement as it is done.

    Parameters
    ----------
    plan
        What to measure; call ``plan.check()`` first.
    say
        Takes one line of progress at a time.

    Raises
    ------
    ServerError
        If a server or the client fails, or a request does not get all of its tokens.
    """
    with TemporaryDirectory(prefix="lethe-bench-") as folder:
        for number in range(plan.repeats * len(plan.arms)):
            repeat, arm = number // len(plan.arms) + 1, plan.arms[number % len(plan.arms)]
            label = f"[{number + 1}/{plan.repeats * len(plan.arms)}] repeat {repeat}, {arm}"
            yield measure(plan, arm, repeat, Path(folder), _prefixed(say, f"{label}: "))


def measure(plan: Plan, arm: str, repeat: int, folder: Path, say: Callable[[str], None]) -> Measurement:
    """Start an arm's server, warm it up, run the client against it, read its log, end it."""
    log, output, client_log = (folder / f"{arm}-{repeat}.{end}" for end in ("server.log", "json", "client.log"))
    offline = {"HF_HUB_OFFLINE": "1"} if Path(plan.model_path).is_dir() else {}
    say("starting the server")
    with Server(plan.server_command(arm), plan.port, log, offline) as server:
        warm_up(server, plan)
        before, offset = server.get("/server_info"), log.stat().st_size
        meter = CpuMeter(server)
        say(f"ready after {server.ready_seconds:.0f} s; {plan.requests} requests")

        def waiting(seconds: float) -> None:
            steps = DECODE.findall(read_from(log, max(offset, log.stat().st_size - 8192)))
            state = f"{steps[-1][0]} requests running, {steps[-1][1]} tokens held" if steps else "no decode step yet"
            say(f"{seconds:.0f} s, {state}")

        try:
            run_client(plan.client_command(output), client_log, plan.timeout, waiting)
            others = meter.others()
            after = server.get("/server_info")
        except (OSError, ServerError) as error:
            raise ServerError(f"{arm}: {error}\nlast lines of the server:\n{tail(log)}") from None
        text = read_from(log, offset)
    result = json.loads(output.read_text().splitlines()[-1])
    _check_complete(plan, arm, result)
    held, times = parse_log(text), {name: value for name, value in result.items() if _is_time(name, value)}
    say(
        f"{times['duration']:.0f} s, {times['output_throughput']:.1f} tokens/s, {held.running_mean:.1f} requests at a "
        f"time, {held.retracted_requests} retracted, {others:.0%} of the CPU taken by other processes"
    )
    return Measurement(
        arm=arm,
        repeat=repeat,
        times=times,
        held=held,
        lethe=evicted(before, after, arm),
        server={name: after[name] for name in SERVER_FACTS if name in after},
        ready_seconds=round(server.ready_seconds, 1),
        others_cpu=round(others, 3),
    )


def warm_up(server: Server, plan: Arms) -> None:
    """Serve one request, the same in every arm, then empty the prefix cache."""
    sampling = {"temperature": 0, "max_new_tokens": plan.warmup_tokens, "ignore_eos": True}
    prompt = [token % 16 for token in range(plan.input_len)]
    with explained(server):
        server.post("/generate", {"input_ids": prompt, "sampling_params": sampling}, timeout=plan.timeout)
        server.post("/flush_cache?timeout=30", {})
    time.sleep(1)


def _check_complete(plan: Plan, arm: str, result: dict[str, Any]) -> None:
    expected = plan.requests * plan.output_len
    if result["completed"] != plan.requests or result["total_output_tokens"] != expected:
        error = next((text.strip() for text in result["errors"] if text.strip()), "no error reported")
        raise ServerError(
            f"{arm}: {result['completed']} of {plan.requests} requests completed with {result['total_output_tokens']} "
            f"of {expected} tokens; if the model's context is too short, lower --output-len. "
            f"First error: {error[-500:]}"
        )


def evicted(before: dict[str, Any], after: dict[str, Any], arm: str) -> dict[str, Any] | None:
    """Return what the plugin counted between two answers of ``/server_info``, None for stock.

    Raises
    ------
    ServerError
        If that is not what the arm must do.
    """
    old, new = (info["internal_states"][0].get("lethe") for info in (before, after))
    if (new is None) != (arm == "stock"):
        state = "does not report eviction; is the plugin installed?" if new is None else "evicts"
        raise ServerError(f"{arm}: the server {state}")
    if new is None:
        return None
    found = {name: new[name] for name in _LEVELS} | {name: new[name] - old[name] for name in _COUNTERS}
    columns = zip(new["tokens_evicted_per_layer"], old["tokens_evicted_per_layer"], strict=True)
    found["tokens_evicted_per_layer"] = [now - then for now, then in columns]
    if (pressure := new.get("pressure")) is not None:
        counters = {name: pressure[name] - old["pressure"][name] for name in ("events", "tokens_evicted")}
        found["pressure"] = pressure | counters
    if found["rounds"] if arm == "idle" else not found["rounds"] and pressure is None:
        expected = "none" if arm == "idle" else "at least one"
        raise ServerError(f"{arm}: {found['rounds']} rounds were run, expected {expected}")
    return found


def _is_time(name: str, value: object) -> bool:
    return isinstance(value, int | float) and name.endswith(_TIMES)


def _prefixed(say: Callable[[str], None], prefix: str) -> Callable[[str], None]:
    return lambda line: say(prefix + line)


def read_from(log: Path, offset: int) -> str:
    """Return what a log has from a byte on."""
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")
