"""What makes the host wait in a trace of decode steps.

SGLang marks every forward pass with a span; a step runs from the beginning of one to the beginning of the next, so it
is one turn of the scheduler's loop, whatever the pass launches::

    span     step[DECODE bs=16]          step[DECODE bs=16]          step[DECODE bs=16]
             |                           |                           |
    host     plan, launch graph, wait for the last result, round  |  plan, ...           profiler ends: waits
             |<--------- step ---------->|<--------- step ---------->|

What the profiler itself waits for, before the first span and behind the last, is in no step. The trace is the
scheduler process's; calls of all its threads count.
"""

from __future__ import annotations

import bisect
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CALLS = ("cuda_runtime", "cuda_driver")
_WAITS = {
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaThreadSynchronize",
    "cudaEventSynchronize",
    "cudaFree",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
    "cuEventSynchronize",
    "cuMemFree",
}
_COPIES = ("cudaMemcpy", "cuMemcpy")


@dataclass(frozen=True)
class Waits:
    """Counts over whole decode steps.

    Attributes
    ----------
    steps
        Decode steps.
    graph_launches
        CUDA graphs that they launched.
    waits
        Calls that make the host wait, by name.
    most
        Such calls in one step, at most.
    copies
        Copies from the device to the host, by name: those that a wait is for, those that nothing waits for, and nodes
        of graphs.
    """

    steps: int
    graph_launches: int
    waits: dict[str, int]
    most: int
    copies: dict[str, int]


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return the events of a chrome trace, gzipped or not."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return list(json.load(file)["traceEvents"])


def is_wait(name: str) -> bool:
    """Whether a call of the CUDA runtime or driver makes the host wait: all synchronisations, copies, and frees.

    A suffix (``_ptsz``, ``_v2``) does not matter.
    """
    name = name.partition("_")[0]
    return name in _WAITS or (name.startswith(_COPIES) and not name.endswith("Async"))


def count_waits(events: Sequence[dict[str, Any]], batch: int) -> Waits:
    """Count what makes the host wait.

    Parameters
    ----------
    events
        Of a trace that decodes and does nothing else.
    batch
        Requests of every step.

    Returns
    -------
    Waits
        Over the steps between the first and the last span.

    Raises
    ------
    ValueError
        If there is no whole step, a forward pass is not a decode step of so many requests, or steps ran without graphs
        (or without a record of CUDA calls).
    """
    spans = sorted(
        (e["ts"], e["name"]) for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("step[")
    )
    if others := [name for _, name in spans if name != f"step[DECODE bs={batch}]"]:
        raise ValueError(f"{len(others)} of {len(spans)} forward passes are others than {batch} decodes: {others[0]}")
    begins = [begin for begin, _ in spans]
    steps = len(begins) - 1
    if steps < 1:
        raise ValueError(f"{len(begins)} forward passes are no whole step")
    calls = [e for e in events if e.get("cat") in _CALLS and begins[0] <= e["ts"] < begins[-1]]
    launches = sum(e["name"].startswith("cudaGraphLaunch") for e in calls)
    if launches < steps:
        raise ValueError(f"{launches} graphs were launched in {steps} steps")
    waits = [e for e in calls if is_wait(e["name"])]
    in_step = Counter(bisect.bisect(begins, e["ts"]) for e in waits)
    numbers = {e["args"]["correlation"] for e in calls if "correlation" in e.get("args", {})}
    copies = [
        e["name"]
        for e in events
        if e.get("cat") == "gpu_memcpy" and "DtoH" in e["name"] and e["args"]["correlation"] in numbers
    ]
    return Waits(
        steps,
        launches,
        dict(Counter(e["name"] for e in waits)),
        max(in_step.values(), default=0),
        dict(Counter(copies)),
    )
