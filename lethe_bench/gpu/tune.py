"""Part ``tune``: the configurations of each kernel, searched on this GPU, and kept where they are faster."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from lethe_bench.cli.checks import say
from lethe_bench.gpu.grid import Point, searched
from lethe_bench.gpu.kernels import Kernels
from lethe_bench.gpu.models import MODELS, Shape
from lethe_bench.gpu.results import Results
from lethe_sglang.files import write_atomically

GAIN = 0.05
"""Share of the default's time that another configuration has to save: less than that is noise."""


class Tune(Kernels):
    """Each kernel at each power of two of requests, for the shapes of each model."""

    name: ClassVar[str] = "tune"

    def points(self) -> list[Point]:
        """See the base class."""
        return searched()

    def listing(self, model: str | None = None) -> dict[str, str]:
        """See the base class."""
        names = (model,) if model else MODELS
        return {f"{name} {point.key}": "search of configurations" for name in names for point in self.points()}

    def work(self, results: Results, model: str | None = None) -> None:
        """Search, and write the file that servers on this GPU read when they start."""
        import torch

        from lethe_sglang.kernels.triton.configurations import file_of

        super().work(results, model)
        device = torch.cuda.get_device_name()
        kept = worth(results.records)
        about = {name: results.header[name] for name in ("command", "date", "versions", "commit")}
        write_atomically(
            file_of(device), json.dumps({"device": device, **about, "configurations": kept}, indent=1) + "\n"
        )
        say(f"{file_of(device)}: {len(kept)} configurations, for every server of yours on this GPU from its start on")

    def table(self, records: dict[str, Any]) -> list[str]:
        """See the base class."""
        rows = [
            f"Other configurations than the default serve where they save {GAIN:.0%} of its time: in bold.",
            "",
            "| point | kernel | default (us) | best (us) | configuration |",
            "| --- | --- | ---: | ---: | --- |",
        ]
        for key, record in records.items():
            if record["status"] != "measured":
                rows.append(f"| {key} | {record['status']}: {record['message']} | | | |")
                continue
            for entry in record["configurations"]:
                best = f"**{entry['us']:.1f}**" if _worth(entry) else f"{entry['us']:.1f}"
                words = ", ".join(f"{name} {value}" for name, value in entry["configuration"].items())
                rows.append(f"| {key} | {entry['kernel']} | {entry['default_us']:.1f} | {best} | {words} |")
        return rows

    def _time(self, model: str, shape: Shape, point: Point) -> dict[str, Any]:
        from lethe_bench.gpu.launches import MAKERS
        from lethe_sglang.kernels.triton import configurations, tuning

        configurations.take([], "none")
        launch = MAKERS[point.kernel](shape, point)
        with tuning():
            launch()
        return {"status": "measured", "configurations": configurations.found()}


def worth(records: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the configurations of all points that are worth their place, one for each key of a kernel."""
    found = [entry for record in records.values() for entry in record.get("configurations", []) if _worth(entry)]
    return list({(entry["kernel"], json.dumps(entry["key"])): entry for entry in found}.values())


def _worth(entry: dict[str, Any]) -> bool:
    return bool(entry["us"] < (1 - GAIN) * entry["default_us"])
