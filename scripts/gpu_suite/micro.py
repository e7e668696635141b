"""Part ``micro``: each kernel against its byte floor and a measured copy of as many bytes; attention beside them."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from typing import Any, ClassVar

from gpu_suite.base import Job, Part, Scope
from gpu_suite.floors import floor_of, memory_of
from gpu_suite.grid import points
from gpu_suite.models import MODELS, Shape
from gpu_suite.results import Results, SuiteError, say


class Micro(Part):
    """Every point of the grid, for the shapes of each model."""

    name: ClassVar[str] = "micro"

    def listing(self, scope: Scope) -> Iterator[str]:
        """See the base class."""
        for model in scope.models:
            for point in points():
                yield f"micro {model}: {point.key}  floor {floor_of(MODELS[model], point)} bytes"

    def jobs(self, scope: Scope) -> Iterator[Job]:
        """See the base class."""
        for model in scope.models:
            yield Job([point.key for point in points()], functools.partial(run, shape=MODELS[model]), model)

    def table(self, records: dict[str, Any]) -> list[str]:
        """See the base class."""
        rows = [
            "| point | time (us) | floor (MB) | of a copy of its bytes | of a large copy |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for key, r in records.items():
            if r["status"] != "measured":
                rows.append(f"| {key} | {r['status']}: {r['message']} | | | |")
                continue
            spread = f"{r['median_us']:.1f} ({r['p10_us']:.1f} to {r['p90_us']:.1f})"
            shares = f"{r['of_copy']:.0%} | {r['of_peak_copy']:.0%}"
            rows.append(f"| {key} | {spread} | {r['floor_bytes'] / 1e6:.3g} | {shares} |")
        return rows


def run(results: Results, deadline: float, shape: Shape) -> None:
    """Time every point that has no record yet.

    Raises
    ------
    SuiteError
        If the device is broken by one of them.
    """
    import torch

    from gpu_suite.launches import MAKERS
    from gpu_suite.timing import Bench
    from lethe_sglang.kernels.triton import tuning

    bench, tuned, by_key = Bench(), set(), {point.key: point for point in points()}
    for key in results.todo():
        if time.monotonic() > deadline - 10:
            return
        point = by_key[key]
        needed, free = memory_of(shape, point), torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        if needed > 0.9 * free:
            results.add(key, {"status": "skipped", "message": f"needs about {needed / 2**30:.0f} GiB of device memory"})
            continue
        try:
            at = point.tuned_at
            if point.kernel != "attention" and at not in tuned:
                with tuning():
                    MAKERS[at.kernel](shape, at)()
                tuned.add(at)
            results.add(key, bench.measure(MAKERS[point.kernel](shape, point), floor_of(shape, point)))
        except Exception as error:  # the record says so; a broken device ends the part
            results.add(key, {"status": "failed", "message": f"{type(error).__name__}: {error}".splitlines()[0]})
            if "CUDA error" in str(error):
                raise SuiteError(f"{key}: {error}".splitlines()[0]) from None
        torch.cuda.empty_cache()
        say(f"{key}: {json.dumps(results.records[key])}")
