#!/usr/bin/env python3
"""Measure on a GPU, in parts that each fit a slot of 10 minutes; no network is needed.

bash scripts/gpu_suite.sh kernels            tests/kernels on the device
bash scripts/gpu_suite.sh micro              each Triton kernel against its byte floor and a measured copy; attention
bash scripts/gpu_suite.sh server             whole servers on dummy weights: stock, and lethe on each backend
bash scripts/gpu_suite.sh report             the JSON of the other parts -> report.md
bash scripts/gpu_suite.sh all                all four, one after the other

Every part takes --dry-run (list what would run; needs no GPU), --minutes, --model and --out. A part that runs out of
time or is killed keeps what it has measured; the same command goes on from there, on the same GPU and versions. Under
``all`` the minutes are those of each part.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUT = ROOT / "docs" / "results" / "gpu"
NOT_RUN = "not yet run on a GPU"
BUDGET, INTERVAL, RECENT = 1024, 128, 0.3
LEAST_SECONDS = 180
"""A server's run is not begun with less time left, unless it is the first of a call."""


class SuiteError(RuntimeError):
    """One line: why nothing can be measured here."""


class Shape(NamedTuple):
    """What a kernel's bytes depend on, and what a model's config.json is made of."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    context: int
    rope_theta: float
    head_dim: int = 128
    itemsize: int = 2


MODELS = {
    "qwen2.5-7b": Shape("Qwen2ForCausalLM", 28, 28, 4, 3584, 18944, 152064, 32768, 1e6),
    "llama-3.1-8b": Shape("LlamaForCausalLM", 32, 32, 8, 4096, 14336, 128256, 131072, 5e5),
}
BATCHES, KEPTS, PREFIXES = (1, 16, 64, 256), (1024, 512, 4096), (0, 4096, 32768)


class Case(NamedTuple):
    """One server workload: the pool is ``share`` of what all requests hold at full length without eviction."""

    name: str
    concurrency: int
    output_len: int
    share: float
    repeats: int = 1
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
ARMS = {
    "stock": ("stock", ()),
    "lethe-flashinfer": ("lethe", ("--attention-backend", "flashinfer")),
    "lethe-triton": ("lethe", ("--attention-backend", "triton")),
    "stock-flashinfer": ("stock", ("--attention-backend", "flashinfer")),
    "idle-flashinfer": ("idle", ("--attention-backend", "flashinfer")),
    "idle-triton": ("idle", ("--attention-backend", "triton")),
}
"""Arm -> arm of the benchmark, more server arguments. Idle: no round is ever due; measured where the pool is ample."""


# -- byte floors: every byte that an operation must read or write, once ------------------------------------------------


def score_bytes(shape: Shape, batch: int, kept: int, recurrence: bool = False) -> int:
    """K, index and states of the own cells; query, log-sum-exp, list ends, first, decay and step of the requests."""
    cell = shape.kv_heads * shape.head_dim * shape.itemsize + 4 + (16 if recurrence else 8)
    request = shape.heads * (shape.head_dim * shape.itemsize + 4) + 4 + 4 + 4 + 8
    return batch * (kept * cell + request) + 4


def attention_bytes(shape: Shape, batch: int, length: int) -> int:
    """K, V and index of the list; query, output, log-sum-exp and list ends of the requests."""
    cell = 2 * shape.kv_heads * shape.head_dim * shape.itemsize + 4
    return batch * (length * cell + shape.heads * (2 * shape.head_dim * shape.itemsize + 4) + 4) + 4


def indices_bytes(layers: int, batch: int, prefix: int, packed: int, tail: int, layer: int) -> int:
    """Write each entry; read the row's entries of prefix and tail and each packed block once; table, row, length."""
    first = layer * packed
    blocks = (first + packed - 1) // layers - first // layers + 1 if packed else 0
    return batch * (4 * (prefix + packed + tail) + 4 * (prefix + blocks + tail) + 16 + 16 + 4) + 4


def repack_bytes(shape: Shape, cells: int) -> int:
    """Gather to scratch and scatter: K, V and score of a cell, read and written twice; both indices (int64), twice."""
    cell = 2 * shape.kv_heads * shape.head_dim * shape.itemsize + 4
    return cells * (4 * cell + 2 * 2 * 8)


def select_bytes(segments: int, candidates: int) -> int:
    """Rank, two flags and the choice of each candidate; the count (int64) of each segment."""
    return segments * (candidates * (4 + 1 + 1 + 1) + 8)


def zero_bytes(layers: int, tokens: int) -> int:
    """One state of each token's cells, and the token's slot (int64)."""
    return tokens * (4 * layers + 8)


def schedule_bytes(batch: int) -> int:
    """Two table entries, row and length (int64) in; first and decay out."""
    return batch * (4 + 4 + 8 + 8 + 4 + 4)


# -- results: one JSON a part, rewritten after every record ------------------------------------------------------------


class Results:
    """Records of one part by their key, on disk after each.

    Parameters
    ----------
    path
        The JSON file; one of the same GPU, versions and commit is taken up.
    header
        What every part says of itself: part, command, date, machine, versions, commit.
    fresh
        Begin anew.
    """

    def __init__(self, path: Path, header: dict[str, Any], planned: Sequence[str], fresh: bool = False) -> None:
        self.path, self.header, self.planned = path, header, list(planned)
        self.records: dict[str, dict[str, Any]] = {}
        if path.is_file() and not fresh:
            old = json.loads(path.read_text(encoding="utf-8"))
            if differing := [name for name in ("gpus", "versions", "commit") if old.get(name) != header[name]]:
                raise SuiteError(f"{path.name} is of other {', '.join(differing)}: give --fresh or another --out")
            self.records = old["records"]

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Take a record and write the file: a kill leaves the old file or the new one, never half of one."""
        self.records[key] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        missing = [name for name in self.planned if name not in self.records]
        body = {**self.header, "finished": not missing, "planned": self.planned, "records": self.records}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def todo(self) -> list[str]:
        """Keys without a record, in order."""
        return [key for key in self.planned if key not in self.records]


def header(part: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Describe a run: command, date, GPU, machine, versions, commit."""
    from lethe_sglang.evaluation.servers import machine, versions

    found, git = machine(), ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = None
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    shown = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    return {
        "part": part, "command": shlex.join(["bash", "scripts/gpu_suite.sh", *shown]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "gpus": found.pop("gpus"),
        "machine": found, "versions": versions(), "commit": commit,
    }  # fmt: skip


def need_gpu() -> None:
    """Raise :class:`SuiteError` without a CUDA device."""
    try:
        import torch

        found = torch.cuda.is_available()
    except ImportError as error:
        raise SuiteError(f"no PyTorch here ({error}); nothing was run. --dry-run lists what would run") from None
    if not found:
        raise SuiteError("no CUDA device here; nothing was run. --dry-run lists what would run")


# -- kernels -----------------------------------------------------------------------------------------------------------


def kernel_files() -> list[str]:
    """Test files of the kernels."""
    return sorted(f"tests/kernels/{path.name}" for path in (ROOT / "tests" / "kernels").glob("test_*.py"))


def kernel_command(file: str) -> list[str]:
    """Return the command line of one file's tests."""
    return ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", file]


def run_kernels(results: Results, deadline: float) -> None:
    """Run each file of tests in a process of its own."""
    for number, file in enumerate(results.todo()):
        left = deadline - time.monotonic()
        if left < 1:
            return
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "junit.xml"
            command = [sys.executable, *kernel_command(file)[1:], f"--junitxml={report}"]
            try:
                done = subprocess.run(command, cwd=ROOT, timeout=left, capture_output=True, text=True, check=False)
            except subprocess.TimeoutExpired:
                say(f"{file}: not done in {left:.0f} s")
                if number == 0:  # it had the whole slot; those behind it have theirs in the next call
                    results.add(file, {"status": "unfinished", "message": f"not done in {left:.0f} s"})
                return
            results.add(file, junit_record(report, done.returncode, done.stdout))
        say(f"{file}: {results.records[file]}")


def junit_record(report: Path, status: int, output: str) -> dict[str, Any]:
    """Count the tests of a JUnit file; name those that failed."""
    if not report.is_file():
        return {"status": "failed", "message": "\n".join(output.strip().splitlines()[-5:])}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: sum(int(s.get(name, 0)) for s in suites) for name in ("tests", "failures", "errors", "skipped")}
    bad = [case.get("name") for s in suites for case in s.iter("testcase") if {e.tag for e in case} & _BAD]
    passed = status == 0 and not bad and counts["tests"] > counts["skipped"]
    return {"status": "passed" if passed else "failed", **counts, "failed": bad}


_BAD = {"failure", "error"}

# -- micro -------------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One point of a grid; what a kernel does not depend on is 0."""

    kernel: str
    batch: int
    kept: int = 0
    prefix: int = 0

    @property
    def key(self) -> str:
        """As the records name it."""
        return f"{self.kernel} batch={self.batch} kept={self.kept} prefix={self.prefix}"


def points() -> list[Point]:
    """Return the grid, what the goals need first."""
    grid = [
        Point(kernel, b, k, p)
        for p in PREFIXES for k in KEPTS for b in BATCHES for kernel in ("score", "attention", "indices")
    ]  # fmt: skip
    rounds = [Point(kernel, b, k) for k in KEPTS for b in BATCHES for kernel in ("repack", "select")]
    small = [Point(kernel, b) for b in BATCHES for kernel in ("zero", "schedule")]
    goal = 3 * len(KEPTS) * len(BATCHES)
    return [*grid[:goal], *rounds, Point("round", 64, BUDGET), *small, *grid[goal:]]


def point_of(key: str) -> Point:
    """Return the point of a key."""
    return next(point for point in points() if point.key == key)


def floor_of(shape: Shape, point: Point) -> int:
    """Byte floor of a point."""
    tail = int(point.kept * RECENT)
    moved = point.batch * shape.layers * (point.kept - tail)
    chosen = select_bytes(shape.layers * point.batch, point.kept + INTERVAL)
    floors: dict[str, Callable[[], int]] = {
        "score": lambda: score_bytes(shape, point.batch, point.kept),
        "attention": lambda: attention_bytes(shape, point.batch, point.prefix + point.kept),
        "indices": lambda: indices_bytes(
            shape.layers, point.batch, point.prefix, point.kept - tail, tail, shape.layers // 2
        ),
        "repack": lambda: repack_bytes(shape, moved),
        "select": lambda: chosen,
        "round": lambda: repack_bytes(shape, moved) + chosen,
        "zero": lambda: zero_bytes(shape.layers, point.batch),
        "schedule": lambda: schedule_bytes(point.batch),
    }
    return floors[point.kernel]()


def memory_of(shape: Shape, point: Point) -> int:
    """Device bytes that a point needs, roughly: its cells, their scratch, lists and random numbers."""
    cell = 2 * shape.kv_heads * shape.head_dim * shape.itemsize
    if point.kernel in ("repack", "round"):
        return point.batch * shape.layers * point.kept * (2 * cell + 64)
    if point.kernel in ("score", "attention"):
        return point.batch * (point.prefix + point.kept) * (cell + 32)
    return point.batch * (point.prefix + point.kept + INTERVAL) * 64 * max(1, shape.layers // 4)


_LARGE = 2**31
"""Bytes from which on a copy is taken to run at full speed."""


class Bench:
    """Times callables on the device; every timed run is a CUDA graph's, with the L2 cache flushed before it."""

    def __init__(self, repeats: int = 30) -> None:
        import torch

        self.torch, self.repeats = torch, repeats
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)
        self.flush = torch.empty(max(8 * l2, 2**29), dtype=torch.uint8, device="cuda")
        self.copies: dict[int, float] = {}
        self.peak = _LARGE / self.copy_us(_LARGE)

    def time(self, run: Callable[[], object]) -> dict[str, Any]:
        """Median and spread of one run, in microseconds."""
        torch = self.torch
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        for begin, end in pairs:  # the flush is long enough for the host to queue what follows
            self.flush.zero_()
            begin.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return summary([begin.elapsed_time(end) * 1e3 for begin, end in pairs])

    def copy_us(self, size: int) -> float:
        """Median of a copy that reads and writes ``size`` bytes in all, in microseconds."""
        if size > _LARGE:
            return size / self.peak
        half = max(16, size // 2)
        if half not in self.copies:
            source = self.torch.empty(half, dtype=self.torch.uint8, device="cuda")
            target = self.torch.empty_like(source)
            self.copies[half] = self.time(lambda: target.copy_(source))["median_us"]
        return self.copies[half]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest and deciles of times in microseconds."""
    deciles = statistics.quantiles(values, n=10)
    return {
        "median_us": statistics.median(values), "least_us": min(values), "most_us": max(values),
        "p10_us": deciles[0], "p90_us": deciles[-1], "repeats": len(values),
    }  # fmt: skip


def decode_lists(torch: Any, point: Point) -> tuple[Any, Any]:
    """CSR lists of a batch over randomly placed cells, no two equal: prefixes are not shared."""
    length = point.prefix + point.kept
    indptr = torch.arange(point.batch + 1, dtype=torch.int32, device="cuda") * length
    indices = torch.randperm(point.batch * length, device="cuda").to(torch.int32) + 1
    return indptr, indices


def make_score(torch: Any, shape: Shape, point: Point) -> Callable[[], object]:
    """One layer's score step."""
    from lethe_sglang.kernels.triton.score import score
    from lethe_sglang.policies.base import Accumulation

    indptr, indices = decode_lists(torch, point)
    cells = indices.shape[0] + 1
    new = {"device": "cuda", "dtype": torch.bfloat16}
    keys = torch.empty(cells, shape.kv_heads, shape.head_dim, **new).normal_()
    query = torch.randn(point.batch, shape.heads, shape.head_dim, **new)
    lse = torch.full((point.batch, shape.heads), 16.0, device="cuda")
    first = torch.full((point.batch,), point.prefix, dtype=torch.int32, device="cuda")
    decay = torch.full((point.batch,), 0.998, device="cuda")
    step = torch.full((point.batch,), point.prefix + point.kept, dtype=torch.int64, device="cuda")
    states, rule = torch.zeros(cells, device="cuda"), Accumulation(decay=0.998)
    scaling = shape.head_dim**-0.5
    return lambda: score(rule, query, keys, lse, indptr, indices, first, decay, step, states, None, scaling)


def make_attention(torch: Any, shape: Shape, point: Point) -> Callable[[], object]:
    """One layer's FlashInfer decode with its log-sum-exp, as SGLang's backend sets it up."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    indptr, indices = decode_lists(torch, point)
    size = (indices.shape[0] + 1, 1, shape.kv_heads, shape.head_dim)
    new = {"device": "cuda", "dtype": torch.bfloat16}
    cache = tuple(torch.empty(size, **new).normal_() for _ in range(2))
    query = torch.randn(point.batch, shape.heads, shape.head_dim, **new)
    out, lse = torch.empty_like(query), torch.empty(point.batch, shape.heads, device="cuda")
    workspace = torch.zeros(2**29, dtype=torch.uint8, device="cuda")
    grouped = shape.heads // shape.kv_heads >= 4
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=grouped, backend="fa2")
    last = torch.ones(point.batch, dtype=torch.int32, device="cuda")
    heads = (shape.heads, shape.kv_heads, shape.head_dim, 1)
    wrapper.plan(indptr, indices, last, *heads, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
    return lambda: wrapper.run(query, cache, out=out, lse=lse, return_lse=True)


def make_indices(torch: Any, shape: Shape, point: Point) -> Callable[[], object]:
    """One layer's lists, the middle layer's, of requests just pruned."""
    from lethe_sglang.kernels.triton.indices import fill_indices

    tail = int(point.kept * RECENT)
    packed, layers = point.kept - tail, shape.layers
    behind, length = point.prefix + packed, point.prefix + point.kept
    table = torch.zeros(point.batch + 1, 4 + 2 * layers, dtype=torch.int32, device="cuda")
    table[1:, 0], table[1:, 1], table[1:, 4 : 4 + layers] = point.prefix, behind, packed
    table[1:, 4 + layers :] = torch.arange(layers, device="cuda") * packed
    blocks = point.batch * length + 1
    slots = torch.randperm(blocks - 1, device="cuda").to(torch.int32) + 1
    rows_table = torch.zeros(point.batch + 1, length, dtype=torch.int32, device="cuda")
    rows_table[1:] = slots.view(point.batch, length)
    rows = torch.arange(1, point.batch + 1, device="cuda")
    seq_lens = torch.full_like(rows, behind + tail)
    indptr = torch.arange(point.batch + 1, dtype=torch.int32, device="cuda") * length
    indices = torch.empty(point.batch * length, dtype=torch.int32, device="cuda")
    return lambda: fill_indices(rows_table, table, rows, seq_lens, layers // 2, blocks, indptr, indices)


def make_repack(torch: Any, shape: Shape, point: Point) -> Callable[[], object]:
    """All layers' moves of a round in which every packed cell changes its place."""
    from lethe_sglang.kernels.triton.repack import repack, scratch_bytes

    cells = point.batch * shape.layers * point.kept
    moved = point.batch * shape.layers * (point.kept - int(point.kept * RECENT))
    size = (cells, shape.kv_heads, shape.head_dim)
    buffers = [torch.zeros(size, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    buffers.append(torch.zeros(cells, device="cuda"))
    source, target = (torch.randperm(cells, device="cuda")[:moved].sort().values for _ in range(2))
    scratch = torch.empty(scratch_bytes(buffers, moved), dtype=torch.uint8, device="cuda")
    return lambda: repack(buffers, source, target, scratch)


def make_select(torch: Any, shape: Shape, point: Point) -> Callable[[], object]:
    """All layers' choices of a round."""
    from lethe_sglang.kernels.triton.select import select

    size = (shape.layers, point.batch, point.kept + INTERVAL)
    rank, valid = torch.rand(size, device="cuda"), torch.ones(size, dtype=torch.bool, device="cuda")
    pinned = torch.zeros_like(valid)
    pinned[..., :4] = True
    count = torch.full(size[:2], point.kept, dtype=torch.int64, device="cuda")
    return lambda: select(rank, valid, pinned, count)


def make_round(torch: Any, shape: Shape, point: Point) -> Callable[[], object]:
    """Make a round's device part: selection and repacking. Ranking, bookkeeping and the host are not in it."""
    parts = [make_select(torch, shape, point), make_repack(torch, shape, point)]
    return lambda: [part() for part in parts]


def make_zero(torch: Any, shape: Shape, point: Point) -> Callable[[], object]:
    """Start the states of one step's new slots, all layers."""
    from lethe_sglang.kernels.triton.zero import start_states

    blocks = 2**16
    score = torch.zeros(shape.layers * blocks, device="cuda")
    slots = torch.randperm(blocks, device="cuda")[: point.batch].contiguous()
    return lambda: start_states(score, None, slots, None, shape.layers)


def make_schedule(torch: Any, shape: Shape, point: Point) -> Callable[[], object]:
    """Resolve what a step scores, once for all layers."""
    from lethe_sglang.kernels.triton.score import schedule
    from lethe_sglang.policies.base import Accumulation

    table = torch.zeros(point.batch + 1, 4 + 2 * shape.layers, dtype=torch.int32, device="cuda")
    rows = torch.arange(1, point.batch + 1, device="cuda")
    seq_lens, rule = torch.full_like(rows, BUDGET), Accumulation(decay=0.998)
    first = torch.empty(point.batch, dtype=torch.int32, device="cuda")
    decay = torch.empty(point.batch, device="cuda")
    return lambda: schedule(table, rows, seq_lens, rule, first, decay)


MAKERS: dict[str, Callable[[Any, Shape, Point], Callable[[], object]]] = {
    "score": make_score, "attention": make_attention, "indices": make_indices, "repack": make_repack,
    "select": make_select, "round": make_round, "zero": make_zero, "schedule": make_schedule,
}  # fmt: skip


def tuned_at(point: Point) -> Point:
    """Return the point whose configuration search serves this one: score and lists share theirs over lengths."""
    return Point(point.kernel, point.batch, BUDGET, 0) if point.kernel in ("score", "indices") else point


def run_micro(results: Results, deadline: float, shape: Shape) -> None:
    """Time every point that is not yet measured."""
    import torch

    from lethe_sglang.kernels.triton import tuning

    bench, tuned = Bench(), set()
    for key in results.todo():
        if time.monotonic() > deadline - 10:
            return
        point = point_of(key)
        needed, free = memory_of(shape, point), torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        if needed > 0.9 * free:
            results.add(key, {"status": "skipped", "message": f"needs about {needed / 2**30:.0f} GiB of device memory"})
            continue
        try:
            at = tuned_at(point)
            if point.kernel != "attention" and at not in tuned:
                search = MAKERS[at.kernel](torch, shape, at)
                with tuning():
                    search()
                del search
                tuned.add(at)
            run = MAKERS[point.kernel](torch, shape, point)
            results.add(key, timed(bench, run, floor_of(shape, point)))
            del run
        except Exception as error:  # the record says so; a broken device ends the part
            results.add(key, {"status": "failed", "message": f"{type(error).__name__}: {error}".splitlines()[0]})
            if "CUDA error" in str(error):
                raise SuiteError(f"{key}: {error}".splitlines()[0]) from None
        torch.cuda.empty_cache()
        say(f"{key}: {json.dumps(results.records[key])}")


def timed(bench: Any, run: Callable[[], object], floor: int) -> dict[str, Any]:
    """Time a callable and set it against copies: of its own bytes, and at the speed of a large one."""
    found = bench.time(run)
    copy = bench.copy_us(floor)
    return {
        "status": "measured", **found, "floor_bytes": floor, "copy_us": copy, "of_copy": copy / found["median_us"],
        "of_peak_copy": floor / found["median_us"] / bench.peak, "peak_copy_gb_s": bench.peak / 1e3,
    }  # fmt: skip


# -- server ------------------------------------------------------------------------------------------------------------


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


def runs(models: Sequence[str], repeats: int = 1) -> list[Run]:
    """Return all runs, repeat after repeat, what the goals need first."""
    return [
        Run(model, case, arm, repeat)
        for repeat in range(1, repeats + 1) for model in models for case in CASES for arm in ARMS
        if not arm.startswith("idle") or case.name.startswith("ample")
    ]  # fmt: skip


def plan_of(run: Run, folder: Path, timeout: float = 540) -> Any:
    """Return the benchmark plan of a run."""
    from lethe_sglang.config import resolve
    from lethe_sglang.evaluation.bench_plan import Plan

    arm, extra = ARMS[run.arm]
    case = run.case
    return Plan(
        model_path=str(folder / run.model), config=resolve("lethe", None, BUDGET), requests=case.concurrency,
        concurrency=case.concurrency, input_len=case.input_len, output_len=case.output_len,
        max_total_tokens=case.pool, repeats=1, arms=(arm,), timeout=timeout, seed=run.repeat,
        server_args=("--load-format", "dummy", *extra),
    )  # fmt: skip


def write_model(folder: Path, shape: Shape) -> Path:
    """Write a model's config.json and a tokenizer of one word per token id; weights are SGLang's dummies."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": [shape.architecture], "model_type": shape.architecture.removesuffix("ForCausalLM").lower(),
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary, "max_position_embeddings": shape.context, "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-6 if shape.architecture.startswith("Qwen") else 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if shape.architecture.startswith("Llama"):
        config["rope_scaling"] = {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
    vocabulary = {f"w{i}": i for i in range(shape.vocabulary)}
    tokenizer = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None, "decoder": None, "truncation": None, "padding": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    }  # fmt: skip
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w0", "eos_token": "w1", "unk_token": "w0"}
    for name, body in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", options)):
        (folder / f"{name}.json").write_text(json.dumps(body), encoding="utf-8")
    return folder


def run_servers(results: Results, deadline: float, model: str, repeats: int, folder: Path) -> None:
    """Measure every run of a model that is not yet recorded, as long as there is time."""
    by_key = {run.key: run for run in runs([model], repeats)}
    write_model(folder / model, MODELS[model])
    for number, key in enumerate(results.todo()):
        left = deadline - time.monotonic()
        if left < (LEAST_SECONDS if number else 1):
            return
        record = measure(by_key[key], folder, left)
        if record["status"] == "unfinished" and number:
            say(f"{key}: not done in the {left:.0f} s that were left; the next call begins with it")
            return
        results.add(key, record)
        say(f"{key}: {record['status']} {record.get('message', '')}")


def measure(run: Run, folder: Path, seconds: float) -> dict[str, Any]:
    """Measure one run; a refusal, a failure and a run that takes too long are records too."""
    from lethe_sglang.evaluation import bench
    from lethe_sglang.evaluation.servers import ServerError, ending_on_signals

    plan = plan_of(run, folder, seconds)
    plan.check()
    record = {"arm": run.arm, "command": shlex.join(plan.readable(plan.server_command(ARMS[run.arm][0])))}
    try:
        with tempfile.TemporaryDirectory() as logs, ending_on_signals(), alarm(seconds):
            found = bench.measure(plan, ARMS[run.arm][0], run.repeat, Path(logs), say)
    except OutOfTime:
        return record | {"status": "unfinished", "message": f"not done in {seconds:.0f} s"}
    except ServerError as error:
        return record | failure(str(error), seconds)
    return record | {"status": "measured", **asdict(found), "arm": run.arm}


def failure(message: str, seconds: float) -> dict[str, Any]:
    """Tell a refusal by the plugin and a run out of time from other failures."""
    if "the client was not done by then" in message:
        return {"status": "unfinished", "message": f"not done in {seconds:.0f} s"}
    for line in message.splitlines():
        for sign in ("lethe: error: ", "ConfigError: "):
            if sign in line:
                return {"status": "refused", "message": f"refused: {line.partition(sign)[2].strip()}"}
    return {"status": "failed", "message": "\n".join(message.splitlines()[-5:])}


class OutOfTime(Exception):
    """The slot is over."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` inside the block after so many seconds."""

    def over(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- report ------------------------------------------------------------------------------------------------------------

Found = list[tuple[str, float]]


@dataclass(frozen=True)
class Goal:
    """One goal of the GPU work: ``values`` must all be at least (or, unless ``least``, at most) ``limit``."""

    text: str
    limit: float
    least: bool
    unit: str
    planned: int
    values: Callable[[dict[str, Any]], Found]
    necessary: bool = False
    """Whether what is measured is only part of what the goal speaks of: it can be missed, but not met."""

    def mark(self, records: dict[str, Any]) -> str:
        """Return met, missed with the figure, or not yet run."""
        found = self.values(records)
        if not found:
            return NOT_RUN
        good = [value for _, value in found if (value >= self.limit if self.least else value <= self.limit)]
        label, worst = (min if self.least else max)(found, key=lambda pair: pair[1])
        figure = f"{worst:.3g}{self.unit} ({label}); {len(good)} of {len(found)} points meet it"
        if len(good) < len(found):
            return f"missed: worst {figure}"
        if self.necessary:
            return f"{NOT_RUN} as a whole; the part that was: worst {figure}"
        if len(found) < self.planned:
            return f"{NOT_RUN} in full: {len(found)} of {self.planned} points; worst {figure}"
        return f"met: worst {figure}"


def micro_values(kernel: str, field: str, prefix: int | None = None, scale: float = 1.0) -> Callable[[Any], Found]:
    """Return a reader of one field of one kernel's points."""

    def read(records: dict[str, Any]) -> Found:
        return [
            (f"{model}, {key}", record[field] * scale)
            for model, part in records["micro"].items() for key, record in part.items()
            if key.split()[0] == kernel and record["status"] == "measured"
            and (prefix is None or key.endswith(f"prefix={prefix}"))
        ]  # fmt: skip

    return read


def score_to_attention(records: dict[str, Any]) -> Found:
    """Score time over attention time where both read the same list."""
    found = []
    for model, part in records["micro"].items():
        for key, record in part.items():
            other = part.get(key.replace("score", "attention"), {})
            both = record["status"] == other.get("status") == "measured"
            if key.startswith("score") and key.endswith("prefix=0") and both:
                found.append((f"{model}, {key}", record["median_us"] / other["median_us"]))
    return found


def medians(records: dict[str, Any], field: Callable[[Any], float]) -> dict[tuple[str, str], dict[str, float]]:
    """Median over repeats of a figure of servers: (model, case) -> arm -> median."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for key, record in records["server"].items():
        if record["status"] == "measured":
            model, case, arm, _ = key.split()
            values.setdefault((model, case), {}).setdefault(arm, []).append(field(record))
    return {key: {arm: statistics.median(v) for arm, v in arms.items()} for key, arms in values.items()}


def against_stock(cases: str, field: Callable[[Any], float], saved: bool = False) -> Callable[[Any], Found]:
    """Return a reader of lethe / stock, each lethe arm against stock at its defaults; ``saved``: the share less."""

    def read(records: dict[str, Any]) -> Found:
        found = []
        for (model, case), arms in medians(records, field).items():
            for arm in ("lethe-flashinfer", "lethe-triton"):
                if case.startswith(cases) and arm in arms and "stock" in arms:
                    ratio = arms[arm] / arms["stock"]
                    found.append((f"{model} {case} {arm}", (1 - ratio) * 100 if saved else ratio))
        return found

    return read


def index_share(records: dict[str, Any]) -> Found:
    """Index filling of all layers as a share (%) of a lethe arm's decode step, at batch 64 and kept 1,024."""
    steps = medians(records, lambda record: float(record["times"]["median_tpot_ms"]))
    found = []
    for model, part in records["micro"].items():
        fill = part.get(Point("indices", 64, BUDGET).key, {})
        arms = steps.get((model, "ample-4k"), {})
        for arm in ("lethe-flashinfer", "lethe-triton"):
            if fill.get("status") == "measured" and arm in arms:
                share = fill["median_us"] * MODELS[model].layers / (arms[arm] * 1e3) * 100
                found.append((f"{model} {arm}", share))
    return found


def throughput(record: Any) -> float:
    """Output tokens per second."""
    return float(record["times"]["output_throughput"])


def held(record: Any) -> float:
    """KV tokens per running request, mean over decode steps."""
    return float(record["held"]["tokens_mean"] / record["held"]["running_mean"])


def never(records: dict[str, Any]) -> Found:
    """No part of the suite measures it."""
    return []


_M, _GRID = len(MODELS), len(BATCHES) * len(KEPTS)
GOALS = (
    Goal("score kernel: 85 % or more of the bandwidth of a copy of its bytes", 85, True, " %",
         _M * _GRID * len(PREFIXES), micro_values("score", "of_copy", scale=100)),
    Goal("score kernel: at most 0.55x the attention kernel's time at equal length", 0.55, False, "x", _M * _GRID,
         score_to_attention),
    Goal("repack: 70 % or more of the bandwidth of a copy of its bytes", 70, True, " %", _M * _GRID,
         micro_values("repack", "of_copy", scale=100)),
    Goal("index filling: under 3 % of a decode step (all layers, batch 64)", 3, False, " %", 2 * _M, index_share),
    Goal("a round: under 2 ms for 64 requests (measured: selection and repacking)", 2, False, " ms", _M,
         micro_values("round", "median_us", scale=1e-3), necessary=True),
    Goal("pool ample: decode throughput at least 97 % of stock at its defaults", 0.97, True, "x", 6 * _M,
         against_stock("ample", throughput)),
    Goal("pool full, 16k-token outputs: at least 3x stock's output throughput", 3, True, "x", 2 * _M,
         against_stock("full-16k", throughput)),
    Goal("pool full, 16k-token outputs: KV memory per request down by 90 % or more (mean over decode steps)", 90, True,
         " %", 2 * _M, against_stock("full-16k", held, saved=True)),
    Goal("equal greedy output with and without CUDA graphs and overlap, at concurrency 1, 40 and 100 (no part of the "
         "suite measures it)", 1, True, "", 1, never),
)  # fmt: skip


def load(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the parts' JSON files: records (kernels; micro and servers by model), and the files as they are."""
    records: dict[str, Any] = {"kernels": {}, "micro": {}, "server": {}}
    files = []
    for path in sorted(folder.glob("*.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        files.append(body | {"file": path.name})
        if body["part"] == "micro":
            records["micro"][body["model"]] = body["records"]
        else:
            records[body["part"]] |= body["records"]
    return records, files


def report(folder: Path) -> str:
    """Return the page: goals, then every record of every part."""
    records, files = load(folder)
    lines = ["# Results on a GPU", "", "Written by `bash scripts/gpu_suite.sh report` from the JSON beside it.", ""]
    lines += ["| goal | state |", "| --- | --- |", *(f"| {goal.text} | {goal.mark(records)} |" for goal in GOALS), ""]
    lines += ["A copy of the same bytes, as slow to start as any kernel, is what bandwidths are set against; the share "
              "of a large copy's speed stands beside it. Times are medians, in brackets the deciles.", ""]  # fmt: skip
    for part in ("kernels", "micro", "server"):
        found = [file for file in files if file["part"] == part]
        lines += [f"## {part}", ""] + ([] if found else [f"{NOT_RUN[0].upper()}{NOT_RUN[1:]}.", ""])
        for file in found:
            lines += [*_about(file), *_TABLES[part](file["records"]), ""]
    return "\n".join(lines)


def _about(file: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in file["versions"].items())
    state = "" if file["finished"] else f" **Unfinished**: {len(file['records'])} of {len(file['planned'])} records."
    where = f"{', '.join(file['gpus'])}; {versions}; commit {file['commit']}; {file['date']}.{state}"
    return [where, "", f"    {file['command']}", ""]


def _kernels_table(records: dict[str, Any]) -> list[str]:
    rows = ["| tests | state | run | failed |", "| --- | --- | ---: | --- |"]
    for key, r in records.items():
        rows.append(f"| {key} | {r['status']} | {r.get('tests', '-')} | {', '.join(r.get('failed', [])) or '-'} |")
    return rows


def _micro_table(records: dict[str, Any]) -> list[str]:
    rows = ["| point | time (us) | floor (MB) | of a copy of its bytes | of a large copy |",
            "| --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for key, r in records.items():
        if r["status"] != "measured":
            rows.append(f"| {key} | {r['status']}: {r['message']} | | | |")
            continue
        spread = f"{r['median_us']:.1f} ({r['p10_us']:.1f} to {r['p90_us']:.1f})"
        shares = f"{r['of_copy']:.0%} | {r['of_peak_copy']:.0%}"
        rows.append(f"| {key} | {spread} | {r['floor_bytes'] / 1e6:.3g} | {shares} |")
    return rows


def _server_table(records: dict[str, Any]) -> list[str]:
    rows = ["| run | output tokens/s | time per token, median (ms) | requests running | KV tokens per request | "
            "requests retracted |", "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for key, r in records.items():
        if r["status"] != "measured":
            message = r["message"].replace("\n", " ").replace("|", "/")
            rows.append(f"| {key} | {r['status']}: {message.removeprefix('refused: ')} | | | | |")
            continue
        h, step = r["held"], r["times"]["median_tpot_ms"]
        numbers = f"{throughput(r):.0f} | {step:.2f} | {h['running_mean']:.1f} | {held(r):.0f}"
        rows.append(f"| {key} | {numbers} | {h['retracted_requests']} |")
    return rows


_TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "kernels": _kernels_table, "micro": _micro_table, "server": _server_table,
}  # fmt: skip

# -- command line ------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Print progress."""
    print(line, file=sys.stderr, flush=True)


def listing(part: str, models: Sequence[str], repeats: int, folder: Path) -> Iterator[str]:
    """Yield exactly what a part would run."""
    if part == "kernels":
        yield from (shlex.join(kernel_command(file)) for file in kernel_files())
    for model in models if part == "micro" else ():
        for point in points():
            yield f"micro {model}: {point.key}  floor {floor_of(MODELS[model], point)} bytes"
    for run in runs(models, repeats) if part == "server" else ():
        plan = plan_of(run, folder)
        for command in (plan.server_command(ARMS[run.arm][0]), plan.client_command(Path("result.json"))):
            yield f"server {run.key}: {shlex.join(plan.readable(command))}"
    if part == "report":
        yield "report: the JSON of the other parts -> report.md"


def jobs(part: str, models: Sequence[str], repeats: int, folder: Path) -> Iterator[tuple[str, list[str], Any]]:
    """Yield a part's files: name, keys, and what measures them by (results, deadline)."""
    if part == "kernels":
        yield "kernels", kernel_files(), run_kernels
    for model in models if part == "micro" else ():
        shape = MODELS[model]
        yield f"micro-{model}", [p.key for p in points()], lambda r, d, shape=shape: run_micro(r, d, shape)
    for model in models if part == "server" else ():
        keys = [run.key for run in runs([model], repeats)]
        yield f"server-{model}", keys, lambda r, d, model=model: run_servers(r, d, model, repeats, folder)


def run_part(part: str, options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Run one part until it is done or its time is over."""
    models = [options.model] if options.model else list(MODELS)
    folder = ROOT / "out" / "gpu-suite"
    if options.dry_run:
        for line in listing(part, models, options.repeats, Path("out") / "gpu-suite"):
            print(line)
        return
    if part == "report":
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "report.md").write_text(report(options.out) + "\n", encoding="utf-8")
        return
    need_gpu()
    if part == "server" and importlib.util.find_spec("sglang") is None:
        raise SuiteError("SGLang is not installed here; unpack a bundle made with --with-sglang")
    deadline = time.monotonic() + options.minutes * 60
    for name, keys, work in jobs(part, models, options.repeats, folder):
        about = header(part, arguments) | {"model": name.partition("-")[2] or None}
        results = Results(options.out / f"{name}.json", about, keys, options.fresh)
        work(results, deadline)
        if left := results.todo():
            say(f"{name}: {len(left)} of {len(keys)} records are left; the same command goes on")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="gpu_suite.sh", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("part", choices=("kernels", "micro", "server", "report", "all"))
    parser.add_argument("--dry-run", action="store_true", help="list what would run")
    parser.add_argument("--model", choices=tuple(MODELS), help="one model (default: both)")
    parser.add_argument("--minutes", type=float, default=9, help="longest run of a part (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each server run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON and of report.md")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    options = parser.parse_args(arguments)
    parts = ("kernels", "micro", "server", "report") if options.part == "all" else (options.part,)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        for part in parts:
            run_part(part, options, arguments)
    except SuiteError as error:
        print(f"gpu_suite: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
