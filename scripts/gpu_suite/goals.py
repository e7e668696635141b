"""The goals of the GPU work, and the figures that they are judged by."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu_suite import server, trace
from gpu_suite.grid import BATCHES, BUDGET, KEPTS, PREFIXES, Point
from gpu_suite.models import MODELS
from gpu_suite.settings import STOCK, compare, pairs

NOT_RUN = "not yet run on a GPU"
Records = dict[str, Any]
"""Records of the parts by name; those of ``micro`` by model."""

Found = list[tuple[str, float]]


@dataclass(frozen=True)
class Goal:
    """One goal: ``values`` must all be at least (or, unless ``least``, at most) ``limit``.

    Attributes
    ----------
    text
        As the report has it.
    unit
        Put behind a figure, with its space.
    planned
        How many values there are if every part has run to its end.
    necessary
        Whether what is measured is only part of what the goal speaks of: it can be missed, but not met.
    """

    text: str
    limit: float
    least: bool
    unit: str
    planned: int
    values: Callable[[Records], Found]
    necessary: bool = False

    def mark(self, records: Records) -> str:
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


# -- micro -------------------------------------------------------------------------------------------------------------


def micro_values(kernel: str, field: str, scale: float = 1.0) -> Callable[[Records], Found]:
    """Return a reader of one field of one kernel's points."""

    def read(records: Records) -> Found:
        return [
            (f"{model}, {key}", record[field] * scale)
            for model, part in records["micro"].items()
            for key, record in part.items()
            if key.split()[0] == kernel and record["status"] == "measured"
        ]

    return read


def score_to_attention(records: Records) -> Found:
    """Score time over attention time where both read the same list."""
    found = []
    for model, part in records["micro"].items():
        for key, record in part.items():
            other = part.get(key.replace("score", "attention"), {})
            both = record["status"] == other.get("status") == "measured"
            if key.startswith("score ") and key.endswith("prefix=0") and both:
                found.append((f"{model}, {key}", record["median_us"] / other["median_us"]))
    return found


# -- server ------------------------------------------------------------------------------------------------------------


def medians(records: Records, field: Callable[[Any], float]) -> dict[tuple[str, str], dict[str, float]]:
    """Median over repeats of a figure of servers: (model, case) -> arm -> median."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for key, record in records["server"].items():
        if record["status"] == "measured":
            model, case, arm, _ = key.split()
            values.setdefault((model, case), {}).setdefault(arm, []).append(field(record))
    return {key: {arm: statistics.median(v) for arm, v in arms.items()} for key, arms in values.items()}


def against_stock(cases: str, field: Callable[[Any], float], saved: bool = False) -> Callable[[Records], Found]:
    """Return a reader of lethe / stock, each lethe arm against stock at its defaults; ``saved``: the share less."""

    def read(records: Records) -> Found:
        found = []
        for (model, case), arms in medians(records, field).items():
            for arm in STOCK:
                if case.startswith(cases) and arm in arms and "stock" in arms:
                    ratio = arms[arm] / arms["stock"]
                    found.append((f"{model} {case} {arm}", (1 - ratio) * 100 if saved else ratio))
        return found

    return read


def index_share(records: Records) -> Found:
    """Index filling of all layers as a share (%) of a lethe arm's decode step, at batch 64 and kept 1,024."""
    steps = medians(records, lambda record: float(record["times"]["median_tpot_ms"]))
    found = []
    for model, part in records["micro"].items():
        fill = part.get(Point("indices", 64, BUDGET).key, {})
        arms = steps.get((model, "ample-4k"), {})
        for arm in STOCK:
            if fill.get("status") == "measured" and arm in arms:
                share = fill["median_us"] * MODELS[model].layers / (arms[arm] * 1e3) * 100
                found.append((f"{model} {arm}", share))
    return found


# -- trace -------------------------------------------------------------------------------------------------------------


def more_than_stock(field: str) -> Callable[[Records], Found]:
    """Return a reader of ``waits`` or ``copies`` of lethe's decode steps, arm by arm, less those of stock's."""

    def read(records: Records) -> Found:
        found = {
            tuple(key.split()): trace.per_step(record, field)
            for key, record in records["trace"].items()
            if record["status"] == "measured"
        }
        return [
            (f"{model} {arm}", value - found[model, trace.REFERENCE])
            for (model, arm), value in found.items()
            if arm in STOCK and (model, trace.REFERENCE) in found
        ]

    return read


# -- greedy ------------------------------------------------------------------------------------------------------------


def replies_that_differ(records: Records) -> Found:
    """Return how many replies of lethe differ in deterministic mode, pair by pair."""
    return [
        (f"{arm} {c.pair.label}", c.differ) for arm in STOCK for c in compare(records["greedy"], "deterministic", arm)
    ]


def replies_more_than_stock(records: Records) -> Found:
    """Return lethe's replies that differ outside deterministic mode, less stock's on the same backend, by kind."""
    found: Found = []
    for arm, stock in STOCK.items():
        ours, theirs = (compare(records["greedy"], "ordinary", name) for name in (arm, stock))
        planned = [pair.kind for pair in pairs("ordinary", arm)]
        for kind in dict.fromkeys(planned):
            both = [[c.differ for c in side if c.pair.kind == kind] for side in (ours, theirs)]
            if all(len(side) == planned.count(kind) for side in both):
                found.append((f"{arm}, {kind}", sum(both[0]) - sum(both[1])))
    return found


_M, _GRID, _ARMS = len(MODELS), len(BATCHES) * len(KEPTS), len(STOCK)
_PAIRS = pairs("deterministic", next(iter(STOCK)))
GOALS = (
    Goal(
        "score kernel: 85 % or more of the bandwidth of a copy of its bytes",
        85,
        True,
        " %",
        _M * _GRID * len(PREFIXES),
        micro_values("score", "of_copy", scale=100),
    ),
    Goal(
        "score kernel: at most 0.55x the attention kernel's time at equal length",
        0.55,
        False,
        "x",
        _M * _GRID,
        score_to_attention,
    ),
    Goal(
        "repack: 70 % or more of the bandwidth of a copy of its bytes",
        70,
        True,
        " %",
        _M * _GRID,
        micro_values("repack", "of_copy", scale=100),
    ),
    Goal("index filling: under 3 % of a decode step (all layers, batch 64)", 3, False, " %", _M * _ARMS, index_share),
    Goal(
        "a round: under 2 ms for 64 requests (measured: selection and repacking)",
        2,
        False,
        " ms",
        _M,
        micro_values("round", "median_us", scale=1e-3),
        necessary=True,
    ),
    Goal(
        "pool ample: decode throughput at least 97 % of stock at its defaults",
        0.97,
        True,
        "x",
        3 * _M * _ARMS,
        against_stock("ample", server.throughput),
    ),
    Goal(
        "pool full, 16k-token outputs: at least 3x stock's output throughput",
        3,
        True,
        "x",
        _M * _ARMS,
        against_stock("full-16k", server.throughput),
    ),
    Goal(
        "pool full, 16k-token outputs: KV memory per request down by 90 % or more (mean over decode steps)",
        90,
        True,
        " %",
        _M * _ARMS,
        against_stock("full-16k", server.held, saved=True),
    ),
    Goal(
        "decode steps, rounds among them, make the host wait no more often than stock's on FlashInfer",
        0,
        False,
        " waits a step more than stock",
        _ARMS,
        more_than_stock("waits"),
    ),
    Goal(
        "decode steps, rounds among them, copy no more often to the host than stock's on FlashInfer",
        0,
        False,
        " copies a step more than stock",
        _ARMS,
        more_than_stock("copies"),
    ),
    Goal(
        "deterministic mode: equal greedy output with and without CUDA graphs, with and without overlap, at "
        "concurrency 1, 40 and 100",
        0,
        False,
        " replies differ",
        _ARMS * len(_PAIRS),
        replies_that_differ,
    ),
    Goal(
        "without that mode: no more greedy replies differ than stock's on the same backend (in all over graphs, over "
        "overlap, over concurrency)",
        0,
        False,
        " more than stock",
        _ARMS * len({pair.kind for pair in _PAIRS}),
        replies_more_than_stock,
    ),
)
