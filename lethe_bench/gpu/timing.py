"""Time of a launch on the device, and of copies to set it against."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

LARGE = 2**31
"""Bytes from which on a copy is taken to run at full speed."""


class Bench:
    """Times callables on the device; every timed run is a CUDA graph's, with the L2 cache flushed before it.

    Parameters
    ----------
    repeats
        Timed runs of a callable.

    Attributes
    ----------
    peak
        Speed of a large copy, in bytes (read and written) per microsecond.
    """

    def __init__(self, repeats: int = 30) -> None:
        self.repeats = repeats
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)
        self.flush = torch.empty(max(8 * l2, 2**29), dtype=torch.uint8, device="cuda")
        self.copies: dict[int, float] = {}
        self.peak = LARGE / self.copy_us(LARGE)

    def time(self, run: Callable[[], object]) -> dict[str, Any]:
        """Median and spread of one run, in microseconds."""
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
        if size > LARGE:
            return size / self.peak
        half = max(16, size // 2)
        if half not in self.copies:
            source = torch.empty(half, dtype=torch.uint8, device="cuda")
            target = torch.empty_like(source)
            self.copies[half] = self.time(lambda: target.copy_(source))["median_us"]
        return self.copies[half]

    def measure(self, run: Callable[[], object], floor: int) -> dict[str, Any]:
        """Time a callable and set it against copies: of its own bytes (``floor``), and at the speed of a large one."""
        found = self.time(run)
        copy = self.copy_us(floor)
        return {
            "status": "measured",
            **found,
            "floor_bytes": floor,
            "copy_us": copy,
            "of_copy": copy / found["median_us"],
            "of_peak_copy": floor / found["median_us"] / self.peak,
            "peak_copy_gb_s": self.peak / 1e3,
        }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest, largest and deciles of times in microseconds."""
    deciles = statistics.quantiles(values, n=10)
    return {
        "median_us": statistics.median(values),
        "least_us": min(values),
        "most_us": max(values),
        "p10_us": deciles[0],
        "p90_us": deciles[-1],
        "repeats": len(values),
    }
