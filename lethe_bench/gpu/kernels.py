"""Part ``kernels``: each kernel against its byte floor and a measured copy of as many bytes; attention beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from lethe_bench.gpu.base import Part, in_a_cell
from lethe_bench.gpu.floors import floor_of, memory_of
from lethe_bench.gpu.grid import Point, points
from lethe_bench.gpu.models import MODELS, Shape
from lethe_sglang.config import ConfigError

LAUNCHED = {
    "score": ("_score",),
    "score-fp8": ("_score",),
    "indices": ("_fill",),
    "repack": ("_repack",),
    "select": ("_select",),
    "places": ("_sort", "_better_place"),
    "likeness": ("_likeness",),
    "zero": ("_start",),
    "schedule": ("_schedule",),
}
"""Which of ``lethe_sglang.kernels.triton.KERNELS`` a point launches."""


class Kernels(Part):
    """Every point of the grid, for the shapes of each model."""

    name: ClassVar[str] = "kernels"

    def listing(self, model: str | None = None) -> dict[str, str]:
        """See the base class."""
        return {
            f"{name} {point.key}": f"byte floor {floor_of(MODELS[name], point)}"
            for name in ((model,) if model else MODELS)
            for point in points()
        }

    def measure(self, key: str) -> dict[str, Any]:
        """See the base class."""
        model, _, rest = key.partition(" ")
        shape, point = MODELS[model], {point.key: point for point in points()}[rest]
        if (needed := memory_of(shape, point)) > 0.9 * _free_bytes():
            return {"status": "skipped", "message": f"needs about {needed / 2**30:.0f} GiB of device memory"}
        try:
            return self._time(model, shape, point)
        except Exception as error:  # the record says so; a broken device ends the part
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            if "CUDA error" in str(error):
                raise ConfigError(f"{key}: {message}") from None
            return {"status": "failed", "message": message}

    def _time(self, model: str, shape: Shape, point: Point) -> dict[str, Any]:
        from lethe_bench.gpu.launches import MAKERS

        launch = MAKERS[point.kernel](shape, point)
        found = dict(self._bench.measure(launch, floor_of(shape, point)))
        return found | ({"others": self._others(point, launch)} if point.tries else {})

    def _others(self, point: Point, launch: Callable[[], object]) -> list[dict[str, Any]]:
        """Time a launch with each configuration that servers do not take."""
        from triton.runtime.errors import OutOfResources

        from lethe_sglang.kernels.triton import KERNELS

        found = []
        for name in LAUNCHED.get(point.kernel, ()):
            for config in KERNELS[name].configs[1:]:
                entry = {"kernel": name, "configuration": config.all_kwargs()}
                try:
                    with KERNELS[name].taking(config):
                        found.append({**entry, "median_us": self._bench.time(launch)["median_us"]})
                except OutOfResources as error:  # of this GPU, by this configuration
                    found.append({**entry, "message": str(error).splitlines()[0]})
        return found

    @functools.cached_property
    def _bench(self) -> Any:
        from lethe_bench.gpu.timing import Bench

        return Bench()

    def table(self, records: dict[str, Any]) -> list[str]:
        """See the base class."""
        rows = [
            "Times are medians, in brackets the deciles. A copy of the same bytes, as slow to start as any kernel, is "
            "what they are set against; the share of a large copy's speed stands beside it. Last comes the fastest of "
            "the configurations that servers do not take, and its time over theirs.",
            "",
            "| point | time (us) | floor (MB) | of a copy of its bytes | of a large copy | another configuration |",
            "| --- | ---: | ---: | ---: | ---: | --- |",
        ]
        for key, r in records.items():
            if r["status"] != "measured":
                rows.append(f"| {key} | {in_a_cell(r)} | | | | |")
                continue
            spread = f"{r['median_us']:.1f} ({r['p10_us']:.1f} to {r['p90_us']:.1f})"
            shares = f"{r['of_copy']:.0%} | {r['of_peak_copy']:.0%}"
            rows.append(f"| {key} | {spread} | {r['floor_bytes'] / 1e6:.3g} | {shares} | {_fastest(r)} |")
        return rows


def _fastest(record: dict[str, Any]) -> str:
    """Say which configuration that servers do not take is the fastest, and its time over theirs."""
    timed = [other for other in record.get("others", []) if "median_us" in other]
    if not timed:
        return "-"
    best = min(timed, key=lambda other: float(other["median_us"]))
    words = ", ".join(f"{name} {value}" for name, value in best["configuration"].items())
    return f"{best['median_us'] / record['median_us']:.2f}: {best['kernel']} with {words}"


def _free_bytes() -> int:
    import torch

    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])
