"""What a benchmark's measurements say: paired ratios, medians, the Markdown page and the JSON file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from lethe_bench.throughput.measure import Measurement
from lethe_bench.throughput.plan import ARMS, Arms, Plan

DISTURBED = 0.05
"""Share of the CPU taken by other processes above which the page warns of its ratios of times."""

PAIRS = (("lethe", "stock"), ("idle", "stock"), ("lethe", "idle"))
"""Numerator and denominator of every ratio."""

RATIOS: dict[str, Callable[[Measurement], float]] = {
    "output throughput": lambda m: m.times["output_throughput"],
    "time per output token, median": lambda m: m.times["median_tpot_ms"],
    "time per output token, p99": lambda m: m.times["p99_tpot_ms"],
    "time to first token, median": lambda m: m.times["median_ttft_ms"],
    "time to first token, p99": lambda m: m.times["p99_ttft_ms"],
    "requests running, mean": lambda m: m.held.running_mean,
    "requests running, peak": lambda m: m.held.running_peak,
    "KV tokens held, mean": lambda m: m.held.tokens_mean,
    "KV tokens held, peak": lambda m: m.held.tokens_peak,
    "KV tokens held per running request": lambda m: m.held.tokens_mean / m.held.running_mean,
}
"""What is compared between arms."""

COUNTS: dict[str, Callable[[Measurement], float]] = {
    "requests running, mean": lambda m: m.held.running_mean,
    "requests running, peak": lambda m: m.held.running_peak,
    "KV tokens held, mean": lambda m: m.held.tokens_mean,
    "KV tokens held, peak": lambda m: m.held.tokens_peak,
    "KV tokens held per running request": lambda m: m.held.tokens_mean / m.held.running_mean,
    "decode steps": lambda m: m.held.decode_steps,
    "retractions (pool full)": lambda m: m.held.retractions,
    "requests retracted": lambda m: m.held.retracted_requests,
    "pruning rounds": lambda m: m.lethe["rounds"] if m.lethe else 0,
    "tokens evicted per layer, mean": lambda m: statistics.fmean(m.lethe["tokens_evicted_per_layer"]) if m.lethe else 0,
    "share of the time spent in rounds": lambda m: m.lethe["round_seconds"] / m.times["duration"] if m.lethe else 0,
    "share of the CPU taken by other processes": lambda m: m.others_cpu,
}
"""What does not depend on the speed of the machine, or hardly."""

ABSOLUTES: dict[str, Callable[[Measurement], float]] = {
    "output throughput (tokens/s)": lambda m: m.times["output_throughput"],
    "time per output token, median (ms)": lambda m: m.times["median_tpot_ms"],
    "time per output token, p99 (ms)": lambda m: m.times["p99_tpot_ms"],
    "time to first token, median (ms)": lambda m: m.times["median_ttft_ms"],
    "time to first token, p99 (ms)": lambda m: m.times["p99_ttft_ms"],
}
"""Speeds of this machine."""


_ELSEWHERE = ("config", "model_path", "port", "server_args")
"""What the JSON holds in another form, or not at all."""


class Measured(Protocol):
    """What is known of every measurement, whatever it measures."""

    @property
    def arm(self) -> str:
        """Which arm."""
        ...

    @property
    def repeat(self) -> int:
        """Which repeat, from 1."""
        ...

    @property
    def server(self) -> dict[str, Any]:
        """Arguments of the server that its defaults decided."""
        ...

    @property
    def others_cpu(self) -> float:
        """Share of the CPU that other processes took, in [0, 1]."""
        ...


M = TypeVar("M", bound=Measured)
Quantities = Mapping[str, Callable[[M], float]]


class About(NamedTuple):
    """What a reader needs besides the numbers: the command line, the hardware, the versions."""

    command: str
    machine: dict[str, Any]
    versions: dict[str, str]


class Spread(NamedTuple):
    """A value per repeat, and what they come to."""

    median: float
    smallest: float
    largest: float
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values), list(values))

    def __str__(self) -> str:
        """Median, then smallest and largest if they differ in print."""
        low, high, middle = (_number(value) for value in (self.smallest, self.largest, self.median))
        return middle if low == high else f"{middle} ({low} to {high})"


def medians(measurements: Sequence[M], arms: Sequence[str], quantities: Quantities[M]) -> dict[str, dict[str, Spread]]:
    """Summarise every arm over its repeats: arm -> name -> spread."""
    by_arm = {arm: [m for m in measurements if m.arm == arm] for arm in arms}
    return {
        arm: {name: Spread.of([value(m) for m in found]) for name, value in quantities.items()}
        for arm, found in by_arm.items()
        if found
    }


def ratios(
    measurements: Sequence[M], pairs: Sequence[tuple[str, str]], quantities: Quantities[M]
) -> dict[str, dict[str, Spread]]:
    """Compare arms within each repeat: ``"lethe / stock"`` -> name -> spread of the ratio over the repeats.

    A repeat counts where it measured both arms; a pair that no repeat measured is left out, and so is a quantity whose
    denominator is 0.
    """
    by_repeat: dict[int, dict[str, M]] = {}
    for measured in measurements:
        by_repeat.setdefault(measured.repeat, {})[measured.arm] = measured
    found: dict[str, dict[str, Spread]] = {}
    for over, under in pairs:
        both = [(arms[over], arms[under]) for arms in by_repeat.values() if over in arms and under in arms]
        for name, value in quantities.items():
            if both and all(value(b) for _, b in both):
                found.setdefault(f"{over} / {under}", {})[name] = Spread.of([value(a) / value(b) for a, b in both])
    return found


def to_json(plan: Plan, measurements: Sequence[Measurement], about: About) -> dict[str, Any]:
    """Return everything that was asked for and found, without host names and paths."""
    return {
        **asked(plan, about),
        "client_command": plan.readable(plan.client_command(Path("client.json"))),
        "measurements": [asdict(measured) for measured in measurements],
        "medians": plain(medians(measurements, ARMS, ABSOLUTES | COUNTS)),
        "ratios": plain(ratios(measurements, PAIRS, RATIOS)),
    }


def asked(plan: Arms, about: About) -> dict[str, Any]:
    """Return what was asked for, without host names and paths."""
    return {
        **about._asdict(),
        "model": plan.model_name,
        "plan": {name: value for name, value in asdict(plan).items() if name not in _ELSEWHERE},
        "server_commands": {arm: plan.readable(plan.server_command(arm)) for arm in plan.arms},
        "configs": {
            arm: config.model_dump(mode="json") for arm in plan.arms if (config := plan.arm_config(arm)) is not None
        },
    }


def to_markdown(plan: Plan, measurements: Sequence[Measurement], about: About) -> str:
    """Write the page: what was run, the ratios, what the servers held and, on a GPU, the speeds."""
    arms = [arm for arm in ARMS if any(m.arm == arm for m in measurements)]
    workload = (
        f"{plan.requests} requests of {plan.input_len} + {plan.output_len} tokens, {plan.concurrency} at once; "
        "a fresh server per measurement"
    )
    title = f"{plan.config.policy} against stock SGLang, the same KV pool"
    lines = opening(plan, title, workload, measurements, plan.repeats * len(plan.arms), about)
    if not measurements:
        return "\n".join(lines)
    compared = ratios(measurements, PAIRS, RATIOS)
    if compared:
        rows = {name: [str(found[name]) if name in found else "-" for found in compared.values()] for name in RATIOS}
        lines += ["## Ratios", "", "Per repeat; median (smallest to largest).", "", *table(list(compared), rows), ""]
    per_arm = medians(measurements, arms, ABSOLUTES | COUNTS)
    rows = {name: [str(per_arm[arm][name]) for arm in arms] for name in COUNTS}
    legend = "Means are over decode steps; median (smallest to largest) of the repeats."
    lines += ["## What the servers held", "", legend, "", *table(arms, rows), ""]
    if on_cpu(measurements):
        lines += ["Absolute times on a shared CPU mean nothing, so only ratios are shown; bench.json has them.", ""]
    else:
        rows = {name: [str(per_arm[arm][name]) for arm in arms] for name in ABSOLUTES}
        lines += ["## Speeds", "", *table(arms, rows), ""]
    return "\n".join(lines)


def opening(
    plan: Arms, title: str, workload: str, measurements: Sequence[Measured], wanted: int, about: About
) -> list[str]:
    """Begin a page: what was run on what, what each arm is, and what a reader has to be warned of.

    Parameters
    ----------
    workload
        Requests, and how servers are used.
    wanted
        Measurements of a whole run.
    """
    repeats = max((m.repeat for m in measurements), default=0)
    server = measurements[0].server if measurements else {}
    machine = about.machine
    elsewhere = ", on a CPU, which says little about a GPU" if on_cpu(measurements) else ""
    hardware = ", ".join(machine["gpus"]) if machine["gpus"] and not on_cpu(measurements) else machine["cpu"]
    lines = [
        f"# {title}",
        "",
        f"What it is worth: how much KV memory servers hold and how fast they decode beside each other{elsewhere}. "
        "Nothing here is about the quality of replies.",
        "",
        f"Model {plan.model_name}; {workload}; a KV pool of {plan.max_total_tokens} tokens, "
        f"page size {server.get('page_size', plan.page_size or 'default')}; arms interleaved, "
        f"{repeats} repeat{'s' * (repeats != 1)}. {hardware}, {machine['cores']} cores, "
        f"{machine['memory_gib']:g} GiB; {', '.join(f'{name} {version}' for name, version in about.versions.items())}.",
        "",
        *(f"- **{arm}**: {meaning(plan, arm)}" for arm in plan.legal_arms if any(m.arm == arm for m in measurements)),
        "",
        f"    {about.command}",
        "",
    ]
    if len(measurements) < wanted:
        lines += [f"**Unfinished**: {len(measurements)} of {wanted} measurements.", ""]
    if (most := max((m.others_cpu for m in measurements), default=0.0)) > DISTURBED:
        lines += [
            f"**Disturbed**: other processes took up to {most:.0%} of the CPU during a measurement; ratios of times "
            "are not usable, counts are.",
            "",
        ]
    return lines


def on_cpu(measurements: Sequence[Measured]) -> bool:
    """Say whether servers ran on a CPU, whose speeds mean nothing."""
    return not measurements or measurements[0].server.get("device", "cpu") == "cpu"


def meaning(plan: Arms, arm: str) -> str:
    """Say what an arm is."""
    config = plan.arm_config(arm)
    if config is None:
        return "SGLang at its own defaults, without an eviction flag"
    if arm == "idle":
        return f"`--kv-evict {config.policy}` with a budget of {config.budget.tokens} tokens: no round is ever due"
    rounds = f"a round every {config.rounds.interval} tokens"
    if config.rounds.when == "pressure":
        rounds = f"or more: rounds only when the pool is short, making room for {config.rounds.interval} steps"
    return (
        f"`--kv-evict {config.policy}`, {config.budget.tokens} tokens kept per layer on average "
        f"({config.budget.allocation}), {rounds}, prompt {config.retain.prompt}"
    )


def table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Write a table in Markdown, a name and its cells a row."""
    body = [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]
    return [f"| {' | '.join(['', *columns])} |", "| --- |" + " ---: |" * len(columns), *body]


def _number(value: float) -> str:
    """Write three digits, more before the point where there are more."""
    if value == int(value) and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plain(spreads: dict[str, dict[str, Spread]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return spreads as JSON has them."""
    return {key: {name: spread._asdict() for name, spread in found.items()} for key, found in spreads.items()}
