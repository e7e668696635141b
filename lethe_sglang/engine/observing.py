"""Which observers a configuration asks for; none in production."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lethe_sglang.observers.base import Observer, installed
from lethe_sglang.observers.measure import Measurer

if TYPE_CHECKING:
    from lethe_sglang.engine.runtime import Runtime


def watching(runtime: Runtime) -> list[Observer]:
    """Make the observers of a scheduler whose pool and rows are known."""
    debug, found = runtime.config.debug, list[Observer]()
    if debug.shadow:
        shadow = installed("shadow", "debug.shadow")
        found.append(shadow(runtime.pool.cells, runtime.ledger, runtime.req_to_token))
    if debug.kept_hash or debug.record_kept:
        kept = installed("kept", "debug.kept_hash" if debug.kept_hash else "debug.record_kept")
        found.append(kept(log=debug.record_kept, compare=debug.kept_hash, gather=runtime.ranks.gather))
    if runtime.measures:
        rows = runtime.req_to_token.shape[0]
        found.append(Measurer(rows, runtime.num_layers, runtime.config.retain.sinks, runtime.pool.device))
    return found
