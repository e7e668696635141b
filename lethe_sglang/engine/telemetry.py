"""What operators see: the start-up line, ``/server_info``, the decode log line; Prometheus metrics: ``metrics.py``."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.runtime_context import get_parallel

from lethe_sglang.cache.pool import state_bytes
from lethe_sglang.engine.metrics import held, saved
from lethe_sglang.engine.reach import reach
from lethe_sglang.engine.runtime import Runtime, current

logger = logging.getLogger("lethe_sglang")


def snapshot(runtime: Runtime) -> dict[str, Any]:
    """Everything ``/server_info`` reports under ``internal_states[i]["lethe"]``.

    It only reads: two in a row are the same, and it needs no other rank.

    Returns
    -------
    dict
        Blocks and tokens as counts; ``blocks_held`` is what followed requests hold now, shared prefixes included, and
        ``blocks_packed`` what of it lies in front of their tails. ``pressure`` is None where rounds do not wait for it
        (:meth:`Pressure.report`), and ``quality`` where no request is sampled (:meth:`Monitor.report`).
    """
    counters, config = runtime.counters, runtime.config
    packed = sum(s.layout.prefix + s.layout.packed for s in runtime.ledger.requests.values())
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
        "blocks_packed": packed,
        "blocks_held": held(runtime),
        "blocks_saved": saved(runtime),
        "rounds": counters.rounds,
        "round_launches": counters.launches,
        "round_seconds": round(counters.round_seconds, 6),
        "score_mass_dropped": counters.dropped.mean,
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


def replica() -> int:
    """Return the data-parallel replica of this scheduler, 0 where there is one."""
    return int(get_parallel().dp_rank or 0)


def internal_state(result: Any, controller: Any, request: Any) -> Any:
    """AFTER ``SchedulerInternalStateController.get_internal_state``."""
    result.internal_state["lethe"] = {"dp_rank": replica(), **snapshot(current())}
    return result


def decode_line(parts: list[str], stats: Any) -> list[str]:
    """AFTER ``PoolStats.get_decode_usage_msg_parts``: one more part of the decode log line."""
    runtime = current()
    counters = runtime.counters
    parts = [*parts, f"lethe rounds: {counters.rounds}, saved #token: {saved(runtime)}"]
    if runtime.ledger.on_demand:
        parts.append(f"lethe share: {runtime.pressure.share or 'all'}, #at-floor: {runtime.pressure.at_floor()}")
    return parts
