"""Prometheus metrics of eviction: beside SGLang's own on ``/metrics``, with its labels and its prefix.

SGLang's processes write their metrics into files of one directory, and the HTTP server adds them up when it is scraped.
Counters are published when something is counted, so that what is scraped is what the ledger says; gauges when SGLang
publishes its own, because they look at every running request.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from lethe_sglang.engine.runtime import current

if TYPE_CHECKING:
    from lethe_sglang.engine.runtime import Runtime

PREFIX = "sglang:kv_evict_"

BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Upper bounds of the histogram of round seconds: from one request on a GPU to a full batch on a CPU."""

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Upper bounds of the histogram of the score mass that a round drops."""


def held(runtime: Runtime) -> int:
    """Blocks that running requests hold; a shared prefix is counted for each of them."""
    return sum(state.held for state in runtime.ledger.requests.values())


def saved(runtime: Runtime) -> int:
    """Blocks that running requests do not hold because of eviction."""
    return sum(state.layout.dead_len for state in runtime.ledger.requests.values())


class Number(NamedTuple):
    """One exported number: its name behind ``PREFIX``, the help text, and where it is read."""

    name: str
    text: str
    read: Callable[[Runtime], float]


COUNTERS = (
    Number("rounds_total", "Rounds: one eviction for one request.", lambda r: r.counters.rounds),
    Number("blocks_freed_total", "Blocks that rounds gave back to the allocator.", lambda r: r.counters.blocks_freed),
    Number("requests_pruned_total", "Requests evicted from at least once.", lambda r: r.counters.requests_pruned),
    Number("requests_retracted_total", "Times that a request went back to the queue.", lambda r: r.counters.retracted),
    Number("pressure_events_total", "Times that the pool was short and requests gave.", lambda r: r.pressure.events),
)
GAUGES = (
    Number("held_blocks", "Blocks that running requests hold, shared prefixes counted for each.", held),
    Number("saved_blocks", "Blocks that running requests do not hold because of eviction.", saved),
    Number("budget_tokens", "Tokens that a layer keeps on average.", lambda r: r.config.budget.tokens),
    Number("requests_at_floor", "Running requests taken down to their budget.", lambda r: r.pressure.at_floor()),
    Number(
        "pressure_share_tokens",
        "Share of the last event of pressure; 0 before the first.",
        lambda r: r.pressure.share or 0,
    ),
)
EVICTED = "evicted_cells_total", "Cells evicted in a group of layers: a token evicted in one layer is one cell."
LAYERS = "layers", "Layers of a group, which keep equally many tokens."
SECONDS = "round_seconds", "Host time that the rounds of a step took."
DROPPED = "score_mass_dropped_ratio", "Share of the score of a request's candidates that one of its rounds dropped."
NAMES = tuple(PREFIX + name for name, *_ in (*COUNTERS, *GAUGES, EVICTED, LAYERS, SECONDS, DROPPED))


class Metrics:
    """The metrics of one scheduler process; all of them stand at 0 from its start on.

    Parameters
    ----------
    runtime
        Of this process.
    labels
        SGLang's: name -> value.
    registry
        Where they are registered; None is Prometheus' own.
    """

    def __init__(self, runtime: Runtime, labels: dict[str, Any], registry: Any = None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram  # SGLang has set their directory by now

        self.runtime, self.labels = runtime, labels
        self._published, self._cells = [0.0] * len(COUNTERS), [0] * runtime.num_layers

        def made(kind: Any, name: str, text: str, *more: str, **options: Any) -> Any:
            return kind(PREFIX + name, text, [*labels, *more], registry=registry or REGISTRY, **options)

        def gauge(name: str, text: str, *more: str) -> Any:
            return made(Gauge, name, text, *more, multiprocess_mode="mostrecent")

        self.counters = [made(Counter, name, text).labels(**labels) for name, text, _ in COUNTERS]
        self.gauges = [gauge(name, text).labels(**labels) for name, text, _ in GAUGES]
        self.evicted, self.layers = made(Counter, *EVICTED, "layer_group"), gauge(*LAYERS, "layer_group")
        self.seconds = made(Histogram, *SECONDS, buckets=BUCKETS).labels(**labels)
        runtime.counters.dropped.observe = made(Histogram, *DROPPED, buckets=SHARES).labels(**labels).observe
        self.count()

    def count(self, seconds: float | None = None) -> None:
        """Publish the totals, and the ``seconds`` of a launch."""
        runtime = self.runtime
        totals = [counter.read(runtime) for counter in COUNTERS]
        for child, total, before in zip(self.counters, totals, self._published, strict=True):
            child.inc(total - before)
        evicted = runtime.counters.evicted
        for name, layers in groups(runtime.budgets).items():
            labels = {**self.labels, "layer_group": name}
            self.evicted.labels(**labels).inc(sum(evicted[layer] - self._cells[layer] for layer in layers))
            self.layers.labels(**labels).set(len(layers))
        self._published, self._cells = totals, list(evicted)
        if seconds is not None:
            self.seconds.observe(seconds)

    def refresh(self) -> None:
        """Publish what is the case now."""
        self.runtime.counters.dropped.settle()
        self.count()
        for child, gauge in zip(self.gauges, GAUGES, strict=True):
            child.set(gauge.read(self.runtime))


@lru_cache(maxsize=16)
def groups(budgets: tuple[int, ...]) -> dict[str, list[int]]:
    """Return the classes of layers that keep equally many tokens, by the name of their group, such as ``0-3,6``."""
    classes: dict[int, list[int]] = {}
    for layer, kept in enumerate(budgets):
        classes.setdefault(kept, []).append(layer)
    return {_ranges(layers): layers for layers in classes.values()}


def _ranges(layers: list[int]) -> str:
    ends: list[list[int]] = []
    for layer in layers:
        if ends and ends[-1][-1] == layer - 1:
            ends[-1][1:] = [layer]
        else:
            ends.append([layer])
    return ",".join("-".join(map(str, pair)) for pair in ends)


def start(context: Any, cls: type, *args: Any, **kwargs: Any) -> None:
    """AFTER ``SchedulerMetricsCollector.init_new``: a rank that publishes SGLang's metrics publishes ours."""
    if context.current_scheduler_metrics_enabled:
        metrics = context.collector._lethe = Metrics(current(), dict(context.collector.labels))
        metrics.runtime.counters.publish = metrics.count
        metrics.runtime.monitor.export(metrics.labels)


def refresh(result: None, collector: Any, stats: Any) -> None:
    """AFTER ``SchedulerMetricsCollector.log_stats``."""
    collector._lethe.refresh()
