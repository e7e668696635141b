"""Part ``trace``: whether lethe's decode steps make the host wait more often than stock's.

Each server decodes a steady batch. SGLang's profiler traces some of its steps, rounds among them, and ``waits`` counts
in the trace. The scheduler waits for a step's result whether it is there already or not, and all arms are counted over
as many whole steps, so the counts do not depend on how fast anything is: there is no tolerance.
"""

from __future__ import annotations

import functools
import re
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gpu_suite.base import Job, Part, Scope
from gpu_suite.models import MODELS, write_model
from gpu_suite.replies import rounds_of
from gpu_suite.results import Results
from gpu_suite.server import ARMS, Case, Run, plan_of
from gpu_suite.settings import STOCK
from gpu_suite.slots import OutOfTime, alarm, failure, in_a_cell, measure_each, unfinished, with_server
from gpu_suite.waits import count_waits, read_trace

if TYPE_CHECKING:
    from lethe_sglang.evaluation.bench_plan import Plan
    from lethe_sglang.evaluation.servers import Server

REFERENCE = "stock-flashinfer"
ARMS_TRACED = (REFERENCE, *STOCK)

CASE = Case("trace", 16, 8192, 1.1)
"""All requests are sent at once and none ends before the trace does."""

EVICTION = {"policy": "lethe", "budget": {"tokens": 256}, "rounds": {"interval": 16}}
FORWARDS = 65
"""Forward passes traced. The 64 steps between their beginnings hold four rounds of every request: one in 16 tokens."""


class Trace(Part):
    """One server of each arm, on one model."""

    name: ClassVar[str] = "trace"
    needs_sglang: ClassVar[bool] = True

    def listing(self, scope: Scope) -> Iterator[str]:
        """See the base class."""
        for arm in ARMS_TRACED:
            plan = trace_plan(scope.models[0], arm, scope.folder)
            command = shlex.join(plan.readable(plan.server_command(ARMS[arm][0])))
            load = f"{FORWARDS} forward passes of {plan.requests} requests"
            yield f"trace {scope.models[0]} {arm}, {load}: {command}"

    def jobs(self, scope: Scope) -> Iterator[Job]:
        """See the base class."""
        model = scope.models[0]
        work = functools.partial(run, model=model, folder=scope.folder)
        yield Job([f"{model} {arm}" for arm in ARMS_TRACED], work, model)

    def table(self, records: dict[str, Any]) -> list[str]:
        """See the base class."""
        rows = [
            "| server | steps traced | rounds meanwhile | graphs launched | waits per step | in a step, at most | "
            "copies to the host per step |",
            "| --- | ---: | ---: | ---: | --- | ---: | --- |",
        ]
        for key, r in records.items():
            if r["status"] != "measured":
                rows.append(f"| {key} | {in_a_cell(r)} | | | | | |")
                continue
            waits, copies = (_by_name(r, field) for field in ("waits", "copies"))
            rows.append(
                f"| {key} | {r['steps']} | {r['rounds']} | {r['graph_launches']} | {waits} | {r['most']} | {copies} |"
            )
        return rows


def trace_plan(model: str, arm: str, folder: Path) -> Plan:
    """Return what a server runs and is sent; the model's files are in ``folder``."""
    from lethe_sglang.config import from_mapping

    return replace(plan_of(Run(model, CASE, arm, 1), folder), config=from_mapping(EVICTION, where="the trace"))


def run(results: Results, deadline: float, model: str, folder: Path) -> None:
    """Trace every server that has no record yet, as long as there is time."""
    write_model(folder / model, MODELS[model])
    measure_each(results, deadline, lambda key, seconds: measure(model, key.split()[1], folder, seconds))


def measure(model: str, arm: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Trace one server; the trace stays in ``folder``. A refusal and a failure are records, too."""
    deadline, plan, rounds = time.monotonic() + seconds, trace_plan(model, arm, folder), list[int]()
    command = plan.server_command(ARMS[arm][0])
    path = folder / "traces" / f"{model}-{arm}-TP-0.trace.json.gz"
    path.unlink(missing_ok=True)

    def work(server: Server) -> None:
        with alarm(deadline - time.monotonic()):
            rounds.append(trace(server, plan, arm in STOCK, path))

    record = {"command": shlex.join(plan.readable(command)), "trace": path.name}
    try:
        reason = with_server(command, plan.port, deadline, work)
        if reason is not None:
            return record | failure(reason)
        found = count_waits(read_trace(path), plan.requests)
    except OutOfTime:
        return record | unfinished(seconds)
    except (OSError, EOFError, ValueError) as error:
        return record | failure(f"{path.name}: {error}")
    return record | {"status": "measured", "rounds": rounds[0], **asdict(found)}


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
    from lethe_sglang.evaluation.servers import ServerError

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
        "output_dir": str(path.parent),
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
        If the load is over before.
    """
    from lethe_sglang.evaluation.servers import ServerError

    while not done():
        if load.done():
            raise ServerError(f"the load was over before the trace: {load.exception() or 'all replies are there'}")
        time.sleep(0.2)
