"""What samples of load say: the JSON file, the Markdown page and one picture."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lethe_bench.accuracy.plots import available
from lethe_bench.fidelity.plots import finish, side_by_side, style
from lethe_bench.load.plan import Sweep
from lethe_bench.load.run import Sample
from lethe_bench.throughput.report import About, Spread, asked, medians, on_cpu, opening, plain, ratios, table

PAIRS = (("pressure", "stock"), ("always", "stock"), ("pressure", "always"), ("pressure", "idle"), ("idle", "stock"))
"""Numerator and denominator of every ratio."""

REFERENCE = "stock"
"""The arm whose replies the others' are compared with."""

DIFFER = "replies unlike stock's"


def _number(name: str) -> Callable[[Sample], float]:
    return lambda sample: sample.numbers[name]


SPEEDS = {
    "output throughput": _number("output_throughput"),
    "time to first token, median": _number("ttft_median"),
    "time to first token, p90": _number("ttft_p90"),
    "the server's CPU time per output token": _number("server_cpu"),
}
SPEEDS_OF_LONG = {
    "output tokens per second of the long requests meanwhile": _number("long_rate"),
    "time of the long requests": _number("long_seconds"),
}
"""What depends on the machine; shown as ratios."""

COUNTS = {
    "requests running, mean": _number("running_mean"),
    "requests running, peak": _number("running_peak"),
    "KV tokens held, peak": _number("tokens_peak"),
    "requests retracted": _number("retracted_requests"),
    "rounds": _number("rounds"),
    "pressure events": _number("events"),
    "tokens evicted, all layers": _number("tokens_evicted"),
    "decode steps": _number("decode_steps"),
    "share of the time spent in rounds": lambda sample: sample.numbers["round_seconds"] / sample.numbers["seconds"],
}
COUNTS_OF_LONG = {
    "KV tokens held when the short ones came": _number("held_before"),
    "output tokens of the long requests meanwhile": _number("long_tokens"),
}


def to_json(plan: Sweep, samples: Sequence[Sample], about: About) -> dict[str, Any]:
    """Return everything that was asked for and found, without host names and paths."""
    speeds, counts, found = quantities(plan, samples)
    by_load = {load: [sample for sample in found if sample.load == load] for load in plan.loads}
    return {
        **asked(plan, about),
        "samples": [asdict(sample) for sample in found],
        "medians": {load: plain(medians(some, plan.legal_arms, counts | speeds)) for load, some in by_load.items()},
        "ratios": {load: plain(ratios(some, PAIRS, speeds)) for load, some in by_load.items()},
    }


def quantities(
    plan: Sweep, samples: Sequence[Sample]
) -> tuple[dict[str, Callable[[Sample], float]], dict[str, Callable[[Sample], float]], list[Sample]]:
    """Return the speeds and counts that samples have, and the samples with their replies compared with stock's."""
    speeds, counts = (SPEEDS | SPEEDS_OF_LONG, COUNTS_OF_LONG | COUNTS) if plan.long else (SPEEDS, COUNTS)
    stock = {(sample.repeat, sample.load): sample.replies for sample in samples if sample.arm == REFERENCE}
    found = []
    for sample in samples:
        if (theirs := stock.get((sample.repeat, sample.load))) is not None:
            unlike = sum(one != other for one, other in zip(sample.replies, theirs, strict=True))
            found.append(replace(sample, numbers=sample.numbers | {DIFFER: unlike}))
    if len(found) == len(samples):
        return speeds, counts | {DIFFER: _number(DIFFER)}, found
    return speeds, counts, list(samples)  # some have no stock yet


def to_markdown(plan: Sweep, samples: Sequence[Sample], about: About, picture: str = "") -> str:
    """Write the page: what was run, ratios of speeds and what the servers held, against load if there are several."""
    wanted = plan.repeats * len(plan.arms) * len(plan.loads)
    lines = [*opening(plan, plan.title, plan.workload, samples, wanted, about), picture, ""]
    if not samples:
        return "\n".join(lines)
    arms = [arm for arm in plan.legal_arms if any(sample.arm == arm for sample in samples)]
    speeds, counts, found = quantities(plan, samples)
    loads = [load for load in plan.loads if any(sample.load == load for sample in found)]
    by_load = {load: [sample for sample in found if sample.load == load] for load in loads}
    compared = {load: ratios(some, PAIRS, speeds) for load, some in by_load.items()}
    middle = {load: medians(some, arms, counts | speeds) for load, some in by_load.items()}
    pairs = list(dict.fromkeys(pair for ratios_at in compared.values() for pair in ratios_at))
    if pairs:
        lines += ["## Ratios", "", "Per repeat; median (smallest to largest).", ""]
        lines += _tables(pairs, speeds, compared)
    lines += ["## What the servers held", "", "Median (smallest to largest) of the repeats.", ""]
    lines += _tables(arms, counts, middle)
    if on_cpu(samples):
        lines += ["Absolute times on a shared CPU mean nothing, so only ratios are shown; the JSON has them.", ""]
    else:
        lines += ["## Speeds", "", "In seconds, and tokens per second.", "", *_tables(arms, speeds, middle)]
    return "\n".join(lines)


def _tables(
    columns: Sequence[str], rows: Mapping[str, Any], found: Mapping[int, Mapping[str, Mapping[str, Spread]]]
) -> list[str]:
    """Write one table of all quantities for a single load, and else a table a quantity with a load a row."""

    def cells(name: str, load: int) -> list[str]:
        return [str(found[load].get(column, {}).get(name, "-")) for column in columns]

    if len(found) == 1:
        (load,) = found
        return [*table(columns, {name: cells(name, load) for name in rows}), ""]
    lines = []
    for name in rows:
        lines += [f"**{name}**, by requests at once", ""]
        lines += [*table(columns, {str(load): cells(name, load) for load in found}), ""]
    return lines


def draw(path: Path, plan: Sweep, samples: Sequence[Sample]) -> str:
    """Draw the picture (SVG), if matplotlib is there; returns its Markdown."""
    if not samples or not available():
        return ""
    if plan.long:
        _draw_burst(path, plan, samples)
        return f"![Time to first token of the short requests, and what the long ones got meanwhile]({path.name})"
    _draw_sweep(path, plan, samples)
    return f"![Throughput, retractions, memory and rounds against requests at once]({path.name})"


def _draw_sweep(path: Path, plan: Sweep, samples: Sequence[Sample]) -> None:
    arms = [arm for arm in plan.legal_arms if any(sample.arm == arm for sample in samples)]
    first = {s.repeat: s.numbers["output_throughput"] for s in samples if (s.arm, s.load) == (arms[0], min(plan.loads))}
    shown: dict[str, Callable[[Sample], float]] = {
        f"output throughput, of {arms[0]}'s at {min(plan.loads)}": (
            lambda sample: sample.numbers["output_throughput"] / first[sample.repeat]
        ),
        **{name: COUNTS[name] for name in ("requests retracted", "KV tokens held, peak", "rounds")},
    }
    figure, all_axes = side_by_side(len(shown))
    for axes, (title, value) in zip(all_axes, shown.items(), strict=True):
        for number, arm in enumerate(arms):
            known = [sample for sample in samples if sample.arm == arm and sample.repeat in first]
            loads = sorted({sample.load for sample in known})
            spreads = [Spread.of([value(sample) for sample in known if sample.load == load]) for load in loads]
            middle = [spread.median for spread in spreads]
            below = [spread.median - spread.smallest for spread in spreads]
            above = [spread.largest - spread.median for spread in spreads]
            axes.errorbar(loads, middle, yerr=[below, above], label=arm, **style(2 * number), elinewidth=0.7)
        axes.set(xlabel="requests at once", ylabel=title, ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.set_xticks(plan.loads, map(str, plan.loads))
    finish(figure, all_axes, path)


def _draw_burst(path: Path, plan: Sweep, samples: Sequence[Sample]) -> None:
    figure, (waited, got) = side_by_side(2)
    colours = importlib.import_module("matplotlib").colormaps["tab20"]
    for number, arm in enumerate(arm for arm in plan.legal_arms if any(sample.arm == arm for sample in samples)):
        for sample in (sample for sample in samples if sample.arm == arm):
            look = {"color": colours(2 * number), "label": arm if sample.repeat == 1 else None, "linewidth": 1}
            done = [(rank + 1) / len(sample.ttfts) for rank in range(len(sample.ttfts))]
            waited.step(sorted(sample.ttfts), done, where="post", **look)
            got.plot([at for at, _ in sample.progress], [tokens for _, tokens in sample.progress], **look)
    waited.set(
        xlabel="seconds since the short requests came", ylabel="share of them with a first token", ylim=(0, 1.02)
    )
    got.set(
        xlabel="seconds, until the last short one ends", ylabel="output tokens of the long requests", ylim=(0, None)
    )
    finish(figure, [waited, got], path)
