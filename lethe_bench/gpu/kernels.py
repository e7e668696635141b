"""Part ``kernels``: each kernel against its byte floor and a measured copy of as many bytes; attention beside them."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from lethe_bench.gpu.base import Part, in_a_cell
from lethe_bench.gpu.floors import floor_of, memory_of
from lethe_bench.gpu.grid import Point, points
from lethe_bench.gpu.models import MODELS, Shape
from lethe_sglang.config import ConfigError


class Kernels(Part):
    """Every point of the grid, for the shapes of each model."""

    name: ClassVar[str] = "kernels"

    def __init__(self) -> None:
        self._tuned: set[tuple[str, Point]] = set()

    def points(self) -> list[Point]:
        """Return what is timed."""
        return points()

    def listing(self, model: str | None = None) -> dict[str, str]:
        """See the base class."""
        return {
            f"{name} {point.key}": f"byte floor {floor_of(MODELS[name], point)}"
            for name in ((model,) if model else MODELS)
            for point in self.points()
        }

    def measure(self, key: str) -> dict[str, Any]:
        """See the base class."""
        model, _, rest = key.partition(" ")
        shape, point = MODELS[model], {point.key: point for point in self.points()}[rest]
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
        from lethe_sglang.kernels.triton import tuning

        at = point.tuned_at
        if point.kernel != "attention" and (model, at) not in self._tuned:
            with tuning():
                MAKERS[at.kernel](shape, at)()
            self._tuned.add((model, at))
        return dict(self._bench.measure(MAKERS[point.kernel](shape, point), floor_of(shape, point)))

    @functools.cached_property
    def _bench(self) -> Any:
        from lethe_bench.gpu.timing import Bench

        return Bench()

    def table(self, records: dict[str, Any]) -> list[str]:
        """See the base class."""
        rows = [
            "Times are medians, in brackets the deciles. A copy of the same bytes, as slow to start as any kernel, is "
            "what they are set against; the share of a large copy's speed stands beside it.",
            "",
            "| point | time (us) | floor (MB) | of a copy of its bytes | of a large copy |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for key, r in records.items():
            if r["status"] != "measured":
                rows.append(f"| {key} | {in_a_cell(r)} | | | |")
                continue
            spread = f"{r['median_us']:.1f} ({r['p10_us']:.1f} to {r['p90_us']:.1f})"
            shares = f"{r['of_copy']:.0%} | {r['of_peak_copy']:.0%}"
            rows.append(f"| {key} | {spread} | {r['floor_bytes'] / 1e6:.3g} | {shares} |")
        return rows


def _free_bytes() -> int:
    import torch

    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])
