"""What operators see: the start-up line, ``/server_info``, the decode log line, Prometheus metrics."""

from __future__ import annotations

import logging
from typing import Any

from lethe_sglang.cache.layout import page_ceil
from lethe_sglang.cache.pool import state_bytes
from lethe_sglang.engine.reach import reach
from lethe_sglang.engine.runtime import Runtime, current

logger = logging.getLogger("lethe_sglang")


def snapshot(runtime: Runtime) -> dict[str, Any]:
    """Everything ``/server_info`` reports under ``internal_states[i]["lethe"]``.

    It only reads: two in a row are the same, and it needs no other rank.

    Returns
    -------
    dict
        Blocks and tokens as counts; ``blocks_packed`` is what followed requests hold now in front of their tails,
        shared prefixes included. ``pressure`` is None where rounds do not wait for it (:meth:`Pressure.report`), and
        ``quality`` where no request is sampled (:meth:`Monitor.report`).
    """
    counters, config = runtime.counters, runtime.config
    held = sum(s.layout.prefix + s.layout.packed for s in runtime.ledger.requests.values())
    out: dict[str, Any] = {
        "policy": config.policy,
        "budget_tokens": config.budget.tokens,
        "when": config.rounds.when,
        "interval": config.rounds.interval,
        "recent": config.recent,
        "layers": [k + config.recent for k in runtime.budgets],
        "allocation": config.budget.allocation,
        "prompt": config.retain.prompt,
        "requests_running": len(runtime.ledger.requests),
        "blocks_packed": held,
        "rounds": counters.rounds,
        "round_launches": counters.launches,
        "round_seconds": round(counters.round_seconds, 6),
        "requests_pruned": counters.requests_pruned,
        "requests_retracted": counters.retracted,
        "tokens_evicted_per_layer": list(counters.evicted),
        "blocks_freed_total": counters.blocks_freed,
        "held_peak_request": counters.peak_request,
        "last_finished": counters.last_finished,
        "pressure": runtime.pressure.report() if config.rounds.by_pressure else None,
        "reach": {**reach(runtime)._asdict(), "acts": reach(runtime).acts},
        "quality": runtime.monitor.report(),
        "auxiliary_bytes": auxiliary_bytes(runtime),
    }
    for observer in runtime.observers:
        out |= observer.report()
    return out


def auxiliary_bytes(runtime: Runtime) -> dict[str, int]:
    """Bytes that the plugin adds to the pool: states (per cell), the ledger's table, the scratch of rounds."""
    table = runtime.ledger.table
    cells = runtime.pool.cells
    pool = 2 * cells.key.numel() * cells.key.element_size()
    scratch = 0 if runtime.pool.scratch is None else runtime.pool.scratch.numel()
    sizes = {"states": state_bytes(runtime.pool), "table": table.numel() * table.element_size(), "scratch": scratch}
    return {"pool": pool, **sizes}


def announce(runtime: Runtime) -> None:
    """Log once what was asked for and what it costs."""
    size, config = auxiliary_bytes(runtime), runtime.config
    logger.info(
        "KV eviction: policy %s, %d tokens a layer on average (recent %d, sinks %d), per-layer budgets %s, "
        "a round every %d tokens%s, prompt %s. Auxiliary memory: states %.2f MiB, table %.2f MiB, "
        "scratch %.2f MiB of a pool of %.1f MiB.",
        config.policy,
        config.budget.tokens,
        config.recent,
        config.retain.sinks,
        list(runtime.budgets),
        runtime.ledger.interval,
        " but only when the pool is short" if config.rounds.by_pressure else "",
        config.retain.prompt,
        size["states"] / 2**20,
        size["table"] / 2**20,
        size["scratch"] / 2**20,
        size["pool"] / 2**20,
    )
    logger.info("KV eviction: resolved configuration %s", config.model_dump_json())


def internal_state(result: Any, controller: Any, request: Any) -> Any:
    """AFTER ``SchedulerInternalStateController.get_internal_state``."""
    result.internal_state["lethe"] = snapshot(current())
    return result


def decode_line(parts: list[str], stats: Any) -> list[str]:
    """AFTER ``PoolStats.get_decode_usage_msg_parts``: one more part of the decode log line."""
    runtime = current()
    counters = runtime.counters
    dead = sum(s.layout.dead_len for s in runtime.ledger.requests.values())
    parts = [*parts, f"lethe rounds: {counters.rounds}, saved #token: {page_ceil(dead, runtime.page_size)}"]
    if runtime.ledger.on_demand:
        parts.append(f"lethe share: {runtime.pressure.share or 'all'}, #at-floor: {runtime.pressure.at_floor()}")
    return parts


class Metrics:
    """Prometheus gauges, created inside the scheduler once SGLang's own are."""

    def __init__(self, labels: dict[str, str]) -> None:
        from prometheus_client import Gauge  # only after SGLang has set the multiprocess directory

        self.labels = labels
        names = list(labels)

        def gauge(name: str, text: str, extra: tuple[str, ...] = ()) -> Any:
            return Gauge(f"sglang:kv_evict_{name}", text, [*names, *extra], multiprocess_mode="mostrecent")

        self.rounds = gauge("rounds_total", "Pruning rounds (one request each).")
        self.freed = gauge("blocks_freed_total", "KV blocks returned to the allocator by rounds.")
        self.saved = gauge("saved_blocks", "Blocks that running requests do not hold because of eviction.")
        self.pruned = gauge("requests_pruned_total", "Requests evicted from at least once.")
        self.seconds = gauge("round_seconds_total", "Host seconds spent in rounds.")
        self.evicted = gauge("evicted_cells_total", "Cells evicted.", ("layer",))
        self.events = gauge("pressure_events_total", "Times that the pool was short and running requests gave.")
        self.share = gauge("pressure_share_tokens", "Share of the last event, in tokens; 0 before the first.")
        self.floors = gauge("requests_at_floor", "Running requests that hold no more than their budget.")

    def log(self, runtime: Runtime) -> None:
        """Publish the counters."""
        counters = runtime.counters
        self.rounds.labels(**self.labels).set(counters.rounds)
        self.freed.labels(**self.labels).set(counters.blocks_freed)
        self.saved.labels(**self.labels).set(sum(s.layout.dead_len for s in runtime.ledger.requests.values()))
        self.pruned.labels(**self.labels).set(counters.requests_pruned)
        self.seconds.labels(**self.labels).set(counters.round_seconds)
        pressure = runtime.pressure
        self.events.labels(**self.labels).set(pressure.events)
        self.share.labels(**self.labels).set(pressure.share or 0)
        self.floors.labels(**self.labels).set(pressure.at_floor())
        for layer, count in enumerate(counters.evicted):
            self.evicted.labels(**self.labels, layer=str(layer)).set(count)


def start_metrics(result: Any, collector: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``SchedulerMetricsCollector.__init__``."""
    collector._lethe = Metrics(dict(collector.labels))
    current().monitor.export(dict(collector.labels))


def log_metrics(result: Any, collector: Any, stats: Any) -> None:
    """AFTER ``SchedulerMetricsCollector.log_stats``."""
    collector._lethe.log(current())
