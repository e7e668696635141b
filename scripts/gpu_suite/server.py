"""Part ``server``: whole servers on dummy weights, stock and lethe on each backend, pool full and ample."""

from __future__ import annotations

import functools
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from gpu_suite.base import Job, Part, Scope
from gpu_suite.grid import BUDGET
from gpu_suite.models import MODELS, write_model
from gpu_suite.results import Results, say
from gpu_suite.slots import OutOfTime, alarm, failure, in_a_cell, measure_each, unfinished

if TYPE_CHECKING:
    from lethe_sglang.evaluation.bench_plan import Plan


class Case(NamedTuple):
    """One workload.

    Attributes
    ----------
    concurrency
        Requests, all at once.
    output_len, input_len
        Tokens of every answer and of every prompt.
    share
        The pool, as a share of what all requests hold at full length without eviction.
    """

    name: str
    concurrency: int
    output_len: int
    share: float
    input_len: int = 64

    @property
    def pool(self) -> int:
        """KV pool, in tokens."""
        return int(self.concurrency * (self.input_len + self.output_len + 64) * self.share)


CASES = (
    Case("full-16k", 96, 16384, 1 / 6),
    Case("ample-4k", 64, 4096, 1.1),
    Case("ample-16k", 16, 16384, 1.1),
    Case("ample-32k", 1, 32000, 1.1),
    Case("full-4k", 512, 4096, 1 / 8),
    Case("full-32k", 24, 32000, 1 / 3),
)
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "stock": ("stock", ()),
    "lethe-flashinfer": ("lethe", ("--attention-backend", "flashinfer")),
    "lethe-triton": ("lethe", ("--attention-backend", "triton")),
    "stock-flashinfer": ("stock", ("--attention-backend", "flashinfer")),
    "idle-flashinfer": ("idle", ("--attention-backend", "flashinfer")),
    "idle-triton": ("idle", ("--attention-backend", "triton")),
    "lethe-flashinfer-fp8": ("lethe", ("--attention-backend", "flashinfer", "--kv-cache-dtype", "fp8_e4m3")),
    "stock-flashinfer-fp8": ("stock", ("--attention-backend", "flashinfer", "--kv-cache-dtype", "fp8_e4m3")),
}
"""Arm -> arm of the benchmark, more server arguments. Idle: no round is ever due; measured where the pool is ample."""

FP8_MODEL, FP8_CASES = "qwen2.5-7b", ("full-16k", "ample-4k")
"""Where the KV cache is fp8, too; the pool has as many tokens, so half the bytes."""


class Run(NamedTuple):
    """One arm of one case of one model."""

    model: str
    case: Case
    arm: str
    repeat: int

    @property
    def key(self) -> str:
        """As the records name it."""
        return f"{self.model} {self.case.name} {self.arm} #{self.repeat}"


class Server(Part):
    """Every run of the models, one server each."""

    name: ClassVar[str] = "server"
    needs_sglang: ClassVar[bool] = True

    def listing(self, scope: Scope) -> Iterator[str]:
        """See the base class."""
        for run in runs(scope.models, scope.repeats):
            plan = plan_of(run, scope.folder)
            for command in (plan.server_command(ARMS[run.arm][0]), plan.client_command(Path("result.json"))):
                yield f"server {run.key}: {shlex.join(plan.readable(command))}"

    def jobs(self, scope: Scope) -> Iterator[Job]:
        """See the base class."""
        for model in scope.models:
            planned = runs([model], scope.repeats)
            work = functools.partial(run_all, planned=planned, folder=scope.folder)
            yield Job([run.key for run in planned], work, model)

    def table(self, records: dict[str, Any]) -> list[str]:
        """See the base class."""
        rows = [
            "| run | output tokens/s | time per token, median (ms) | requests running | KV tokens per request | "
            "requests retracted |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for key, r in records.items():
            if r["status"] != "measured":
                rows.append(f"| {key} | {in_a_cell(r)} | | | | |")
                continue
            h, step = r["held"], r["times"]["median_tpot_ms"]
            numbers = f"{throughput(r):.0f} | {step:.2f} | {h['running_mean']:.1f} | {held(r):.0f}"
            rows.append(f"| {key} | {numbers} | {h['retracted_requests']} |")
        return rows


def runs(models: Sequence[str], repeats: int = 1) -> list[Run]:
    """Return all runs, repeat after repeat, what the goals need first."""
    return [
        Run(model, case, arm, repeat)
        for repeat in range(1, repeats + 1)
        for model in models
        for case in CASES
        for arm in ARMS
        if _measured(model, case.name, arm)
    ]


def _measured(model: str, case: str, arm: str) -> bool:
    if arm.endswith("fp8"):
        return model == FP8_MODEL and case in FP8_CASES
    return case.startswith("ample") or not arm.startswith("idle")


def plan_of(run: Run, folder: Path, timeout: float = 540) -> Plan:
    """Return the benchmark plan of a run; the model's files are in ``folder``, ``timeout`` is in seconds."""
    from lethe_sglang.config import resolve
    from lethe_sglang.evaluation.bench_plan import Plan

    arm, extra = ARMS[run.arm]
    case = run.case
    return Plan(
        model_path=str(folder / run.model),
        config=resolve("lethe", None, BUDGET),
        requests=case.concurrency,
        concurrency=case.concurrency,
        input_len=case.input_len,
        output_len=case.output_len,
        max_total_tokens=case.pool,
        repeats=1,
        arms=(arm,),
        timeout=timeout,
        seed=run.repeat,
        server_args=("--load-format", "dummy", *extra),
    )


def run_all(results: Results, deadline: float, planned: Sequence[Run], folder: Path) -> None:
    """Measure every run that has no record yet, as long as there is time."""
    by_key = {run.key: run for run in planned}
    for model in {run.model for run in planned}:
        write_model(folder / model, MODELS[model])
    measure_each(results, deadline, lambda key, seconds: measure(by_key[key], folder, seconds))


def measure(run: Run, folder: Path, seconds: float) -> dict[str, Any]:
    """Measure one run; a refusal, a failure and a run that takes too long are records too."""
    from lethe_sglang.evaluation import bench
    from lethe_sglang.evaluation.servers import ServerError, ending_on_signals

    plan, arm = plan_of(run, folder, seconds), ARMS[run.arm][0]
    plan.check()
    record = {"arm": run.arm, "command": shlex.join(plan.readable(plan.server_command(arm)))}
    try:
        with tempfile.TemporaryDirectory() as logs, ending_on_signals(), alarm(seconds):
            found = bench.measure(plan, arm, run.repeat, Path(logs), say)
    except OutOfTime:
        return record | unfinished(seconds)
    except ServerError as error:
        late = "the client was not done by then" in str(error)
        return record | (unfinished(seconds) if late else failure(str(error)))
    return record | {"status": "measured", **asdict(found), "arm": run.arm}


def throughput(record: dict[str, Any]) -> float:
    """Output tokens per second."""
    return float(record["times"]["output_throughput"])


def held(record: dict[str, Any]) -> float:
    """KV tokens per running request, mean over decode steps."""
    return float(record["held"]["tokens_mean"] / record["held"]["running_mean"])
