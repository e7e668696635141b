"""What a benchmark's measurements say: paired ratios, medians, the Markdown page and the JSON file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from lethe_bench.throughput.measure import Measurement
from lethe_bench.throughput.plan import ARMS, Plan

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


def medians(measurements: Sequence[Measurement]) -> dict[str, dict[str, Spread]]:
    """Summarise every arm over its repeats: arm -> name -> spread."""
    arms = {arm: [m for m in measurements if m.arm == arm] for arm in ARMS}
    return {
        arm: {name: Spread.of([value(m) for m in found]) for name, value in (ABSOLUTES | COUNTS).items()}
        for arm, found in arms.items()
        if found
    }


def ratios(measurements: Sequence[Measurement]) -> dict[str, dict[str, Spread]]:
    """Compare arms within each repeat: ``"lethe / stock"`` -> name -> spread of the ratio over the repeats.

    A repeat counts where it measured both arms; a pair that no repeat measured is left out, and so is a quantity whose
    denominator is 0.
    """
    by_repeat: dict[int, dict[str, Measurement]] = {}
    for measured in measurements:
        by_repeat.setdefault(measured.repeat, {})[measured.arm] = measured
    found: dict[str, dict[str, Spread]] = {}
    for over, under in PAIRS:
        pairs = [(arms[over], arms[under]) for arms in by_repeat.values() if over in arms and under in arms]
        for name, value in RATIOS.items():
            if pairs and all(value(b) for _, b in pairs):
                found.setdefault(f"{over} / {under}", {})[name] = Spread.of([value(a) / value(b) for a, b in pairs])
    return found


def to_json(plan: Plan, measurements: Sequence[Measurement], about: About) -> dict[str, Any]:
    """Return everything that was asked for and found, without host names and paths."""
    workload = {name: value for name, value in asdict(plan).items() if name not in _ELSEWHERE}
    return {
        **about._asdict(),
        "model": plan.model_name,
        "plan": workload,
        "server_commands": {arm: plan.readable(plan.server_command(arm)) for arm in plan.arms},
        "client_command": plan.readable(plan.client_command(Path("client.json"))),
        "configs": {
            arm: config.model_dump(mode="json") for arm in plan.arms if (config := plan.arm_config(arm)) is not None
        },
        "measurements": [asdict(measured) for measured in measurements],
        "medians": _plain(medians(measurements)),
        "ratios": _plain(ratios(measurements)),
    }


def to_markdown(plan: Plan, measurements: Sequence[Measurement], about: About) -> str:
    """Write the page: what was run, the ratios, what the servers held and, on a GPU, the speeds."""
    arms = [arm for arm in ARMS if any(m.arm == arm for m in measurements)]
    repeats = max((m.repeat for m in measurements), default=0)
    server = measurements[0].server if measurements else {}
    on_cpu = server.get("device", "cpu") == "cpu"
    machine = about.machine
    hardware = ", ".join(machine["gpus"]) if machine["gpus"] and not on_cpu else machine["cpu"]
    lines = [
        f"# {plan.config.policy} against stock SGLang, the same KV pool",
        "",
        f"Model {plan.model_name}; {plan.requests} requests of {plan.input_len} + {plan.output_len} tokens, "
        f"{plan.concurrency} at once; a KV pool of {plan.max_total_tokens} tokens, "
        f"page size {server.get('page_size', plan.page_size or 'default')}; a fresh server per measurement, arms "
        f"interleaved, {repeats} repeat{'s' * (repeats != 1)}. {hardware}, {machine['cores']} cores, "
        f"{machine['memory_gib']:g} GiB; {', '.join(f'{name} {version}' for name, version in about.versions.items())}.",
        "",
        *(f"- **{arm}**: {_meaning(plan, arm)}" for arm in arms),
        "",
        f"    {about.command}",
        "",
    ]
    if len(measurements) < plan.repeats * len(plan.arms):
        lines += [f"**Unfinished**: {len(measurements)} of {plan.repeats * len(plan.arms)} measurements.", ""]
    if (most := max((m.others_cpu for m in measurements), default=0.0)) > DISTURBED:
        lines += [
            f"**Disturbed**: other processes took up to {most:.0%} of the CPU during a measurement; ratios of times "
            "are not usable, counts are.",
            "",
        ]
    if not measurements:
        return "\n".join(lines)
    compared = ratios(measurements)
    if compared:
        rows = {name: [str(found[name]) if name in found else "-" for found in compared.values()] for name in RATIOS}
        lines += ["## Ratios", "", "Per repeat; median (smallest to largest).", "", *_table(list(compared), rows), ""]
    per_arm = medians(measurements)
    rows = {name: [str(per_arm[arm][name]) for arm in arms] for name in COUNTS}
    legend = "Means are over decode steps; median (smallest to largest) of the repeats."
    lines += ["## What the servers held", "", legend, "", *_table(arms, rows), ""]
    if on_cpu:
        lines += ["Absolute times on a shared CPU mean nothing, so only ratios are shown; bench.json has them.", ""]
    else:
        rows = {name: [str(per_arm[arm][name]) for arm in arms] for name in ABSOLUTES}
        lines += ["## Speeds", "", *_table(arms, rows), ""]
    return "\n".join(lines)


def _meaning(plan: Plan, arm: str) -> str:
    config = plan.arm_config(arm)
    if config is None:
        return "SGLang at its own defaults, without an eviction flag"
    if arm == "idle":
        return f"`--kv-evict {config.policy}` with a budget of {config.budget.tokens} tokens: no round is ever due"
    return (
        f"`--kv-evict {config.policy}`, {config.budget.tokens} tokens kept per layer on average "
        f"({config.budget.allocation}), a round every {config.rounds.interval} tokens, prompt {config.retain.prompt}"
    )


def _table(columns: Sequence[str], rows: dict[str, list[str]]) -> list[str]:
    body = [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]
    return [f"| {' | '.join(['', *columns])} |", "| --- |" + " ---: |" * len(columns), *body]


def _number(value: float) -> str:
    """Write three digits, more before the point where there are more."""
    if value == int(value) and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _plain(spreads: dict[str, dict[str, Spread]]) -> dict[str, dict[str, dict[str, Any]]]:
    return {key: {name: spread._asdict() for name, spread in found.items()} for key, found in spreads.items()}
