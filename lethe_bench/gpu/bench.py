"""Part ``bench``: ``lethe bench`` on cases for a GPU: dummy weights, each backend, full and ample pools."""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from lethe_bench.cli.checks import say
from lethe_bench.gpu.base import OUT, PORT, Part, in_a_cell
from lethe_bench.gpu.grid import BUDGET
from lethe_bench.gpu.models import MODELS, write_model
from lethe_bench.throughput import measure
from lethe_bench.throughput.plan import Plan
from lethe_sglang.config import resolve
from lethe_sglang.processes import ending_on_signals

LONGEST_SECONDS = 3600
"""Longest run of the client."""


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

    @property
    def key(self) -> str:
        """As the records name it."""
        return f"{self.model} {self.case.name} {self.arm}"

    def plan(self) -> Plan:
        """Return what the server runs and is sent."""
        arm, extra = ARMS[self.arm]
        return Plan(
            model_path=str(OUT / self.model),
            config=resolve("lethe", None, BUDGET),
            requests=self.case.concurrency,
            concurrency=self.case.concurrency,
            input_len=self.case.input_len,
            output_len=self.case.output_len,
            max_total_tokens=self.case.pool,
            repeats=1,
            arms=(arm,),
            port=PORT,
            timeout=LONGEST_SECONDS,
            server_args=("--load-format", "dummy", *extra),
        )


class Bench(Part):
    """Every run of the models, one server each."""

    name: ClassVar[str] = "bench"

    def listing(self, model: str | None = None) -> dict[str, str]:
        """See the base class."""
        found = {}
        for run in runs(model):
            plan = run.plan()
            found[run.key] = shlex.join(plan.readable(plan.server_command(ARMS[run.arm][0])))
        return found

    def measure(self, key: str) -> dict[str, Any]:
        """See the base class."""
        run = {run.key: run for run in runs()}[key]
        plan = run.plan()
        plan.check()
        write_model(OUT / run.model, MODELS[run.model])
        with tempfile.TemporaryDirectory() as logs, ending_on_signals():
            found = measure.measure(plan, ARMS[run.arm][0], 1, Path(logs), say)
        return {"status": "measured", **asdict(found), "arm": run.arm}

    def table(self, records: dict[str, Any]) -> list[str]:
        """See the base class."""
        rows = [
            "| run | output tokens/s | of stock's | time per token, median (ms) | requests running | "
            "KV tokens per request | of stock's | requests retracted |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for key, r in records.items():
            if r["status"] != "measured":
                rows.append(f"| {key} | {in_a_cell(r)} | | | | | | |")
                continue
            stock = records.get(f"{key.rpartition(' ')[0]} stock", {})
            ratios = [
                f"{of(r) / of(stock):.2f}" if stock.get("status") == "measured" else "-" for of in (throughput, held)
            ]
            rows.append(
                f"| {key} | {throughput(r):.0f} | {ratios[0]} | {r['times']['median_tpot_ms']:.2f} | "
                f"{r['held']['running_mean']:.1f} | {held(r):.0f} | {ratios[1]} | {r['held']['retracted_requests']} |"
            )
        return rows


def runs(model: str | None = None) -> list[Run]:
    """Return all runs, or those of one model."""
    return [
        Run(name, case, arm)
        for name in ((model,) if model else MODELS)
        for case in CASES
        for arm in ARMS
        if _measured(name, case.name, arm)
    ]


def _measured(model: str, case: str, arm: str) -> bool:
    if arm.endswith("fp8"):
        return model == FP8_MODEL and case in FP8_CASES
    return case.startswith("ample") or not arm.startswith("idle")


def throughput(record: dict[str, Any]) -> float:
    """Output tokens per second."""
    return float(record["times"]["output_throughput"])


def held(record: dict[str, Any]) -> float:
    """KV tokens per running request, mean over decode steps."""
    return float(record["held"]["tokens_mean"] / record["held"]["running_mean"])
