"""Part ``trace``: whether lethe's decode steps make the host wait more often than stock's.

Each server decodes a steady batch. SGLang's profiler traces some of its steps, rounds among them, and ``waits`` counts
in the trace. The scheduler waits for a step's result whether it is there already or not, and all arms are counted over
as many whole steps, so the counts do not depend on how fast anything is: there is no tolerance.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

from lethe_bench.gpu.base import OUT, Part, failure, in_a_cell, rounds_of, serving
from lethe_bench.gpu.bench import ARMS, Case, Run
from lethe_bench.gpu.models import MODELS, write_model
from lethe_bench.gpu.settings import STOCK
from lethe_bench.gpu.waits import count_waits, read_trace
from lethe_bench.servers import Server, ServerError
from lethe_bench.throughput.plan import Plan
from lethe_sglang.config import from_mapping

REFERENCE = "stock-flashinfer"
ARMS_TRACED = (REFERENCE, *STOCK)

CASE = Case("trace", 16, 8192, 1.1)
"""All requests are sent at once and none ends before the trace does."""

EVICTION = {"policy": "lethe", "budget": {"tokens": 256}, "rounds": {"interval": 16}}
FORWARDS = 65
"""Forward passes traced. The 64 steps between their beginnings hold four rounds of every request: one in 16 tokens."""

WRITING_SECONDS = 600
"""Longest wait for the load to be steady, and for SGLang to write a trace."""


class Trace(Part):
    """One server of each arm, on one model."""

    name: ClassVar[str] = "trace"

    def listing(self, model: str | None = None) -> dict[str, str]:
        """See the base class."""
        model = model or next(iter(MODELS))
        found = {}
        for arm in ARMS_TRACED:
            plan = trace_plan(model, arm)
            found[f"{model} {arm}"] = shlex.join(plan.readable(plan.server_command(ARMS[arm][0])))
        return found

    def measure(self, key: str) -> dict[str, Any]:
        """See the base class."""
        model, arm = key.split()
        write_model(OUT / model, MODELS[model])
        plan, path = trace_plan(model, arm), OUT / "traces" / f"{model}-{arm}-TP-0.trace.json.gz"
        path.unlink(missing_ok=True)
        with serving(plan.server_command(ARMS[arm][0]), plan.port) as server:
            rounds = trace(server, plan, arm in STOCK, path)
        try:
            found = count_waits(read_trace(path), plan.requests)
        except (OSError, EOFError, ValueError) as error:
            return failure(f"{path.name}: {error}")
        return {"status": "measured", "trace": path.name, "rounds": rounds, **asdict(found)}

    def table(self, records: dict[str, Any]) -> list[str]:
        """See the base class."""
        rows = [
            "| server | steps traced | rounds meanwhile | graphs launched | waits per step | in a step, at most | "
            "copies to the host per step | waits, copies more than stock's |",
            "| --- | ---: | ---: | ---: | --- | ---: | --- | ---: |",
        ]
        for key, r in records.items():
            if r["status"] != "measured":
                rows.append(f"| {key} | {in_a_cell(r)} | | | | | | |")
                continue
            waits, copies = (_by_name(r, field) for field in ("waits", "copies"))
            stock = records.get(f"{key.split()[0]} {REFERENCE}", {})
            more = "-"
            if stock.get("status") == "measured":
                more = ", ".join(f"{per_step(r, field) - per_step(stock, field):.3g}" for field in ("waits", "copies"))
            rows.append(
                f"| {key} | {r['steps']} | {r['rounds']} | {r['graph_launches']} | {waits} | {r['most']} | {copies} | "
                f"{more} |"
            )
        return rows


def trace_plan(model: str, arm: str) -> Plan:
    """Return what a server runs and is sent."""
    return replace(Run(model, CASE, arm).plan(), config=from_mapping(EVICTION, where="the trace"))


def trace(server: Server, plan: Plan, evicts: bool, path: Path) -> int:
    """Have a server write the trace of some decode steps, once all requests decode and have had rounds.

    Returns
    -------
    int
        Rounds while it was traced, as its counters have it.

    Raises
    ------
    ServerError
        If the load is over before, or a server that evicts has no round meanwhile.
    """
    warm = re.compile(rf"Decode batch.*?#running-req: {plan.requests},".encode())
    sampling = {"temperature": 0, "max_new_tokens": plan.output_len, "ignore_eos": True}
    prompts = [[number + 1] * plan.input_len for number in range(plan.requests)]
    offset, least = server.log.stat().st_size, plan.first_round + 2 * plan.config.rounds.interval
    pool = ThreadPoolExecutor(1)
    try:
        load = pool.submit(server.post, "/generate", {"input_ids": prompts, "sampling_params": sampling})
        _wait(lambda: len(warm.findall(server.log.read_bytes()[offset:])) >= least, load)
        before = rounds_of(server, evicts)
        server.post("/start_profile", profile_request(path))
        _wait(path.exists, load)
        rounds = rounds_of(server, evicts) - before  # answered when the scheduler has written all of the trace
    finally:  # the load ends with the server
        pool.shutdown(wait=False, cancel_futures=True)
    if evicts and not rounds:
        raise ServerError("no round was run in the traced steps")
    return rounds


def profile_request(path: Path) -> dict[str, Any]:
    """Return what /start_profile is sent: SGLang appends rank and ending to the name."""
    name = path.name.removesuffix("-TP-0.trace.json.gz")
    return {
        "output_dir": str(path.parent.absolute()),
        "profile_id": name,
        "num_steps": FORWARDS,
        "activities": ["CPU", "GPU"],
        "with_stack": False,
        "record_shapes": False,
    }


def per_step(record: dict[str, Any], field: str) -> float:
    """Return ``waits`` or ``copies`` per decode step, those of all names."""
    return float(sum(record[field].values()) / record["steps"])


def _by_name(record: dict[str, Any], field: str) -> str:
    return ", ".join(f"{name} {count / record['steps']:.3g}" for name, count in record[field].items()) or "none"


def _wait(done: Callable[[], bool], load: Future[str]) -> None:
    """Wait until something is done.

    Raises
    ------
    ServerError
        If the load is over before, or it takes too long.
    """
    deadline = time.monotonic() + WRITING_SECONDS
    while not done():
        if load.done():
            raise ServerError(f"the load was over before the trace: {load.exception() or 'all replies are there'}")
        if time.monotonic() > deadline:
            raise ServerError(f"no steady load, or no trace, within {WRITING_SECONDS} s")
        time.sleep(0.2)
