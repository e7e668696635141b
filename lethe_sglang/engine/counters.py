"""What has happened since the server started: host numbers, counted by the runtime, read by whoever asks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lethe_sglang.cache.layout import RoundPlan
from lethe_sglang.cache.ledger import RequestState
from lethe_sglang.cache.rounds import RoundResult
from lethe_sglang.engine.dropped import Dropped

FINISHED = 1024
"""Finished requests whose records are kept."""


def lives(req: Any) -> list[RequestState | None]:
    """Return what was followed of a request so far, oldest first; None where it was retracted."""
    found: list[RequestState | None] = req.__dict__.setdefault("_kv_evict_lives", [])
    return found


@dataclass
class Counters:
    """Totals since the start, and the records of the last ``FINISHED`` requests.

    Attributes
    ----------
    rounds, launches
        Rounds (one request each), and launches (of all requests that were due in a step).
    requests_pruned, retracted
        Requests evicted from at least once, and retractions.
    evicted
        Cells evicted, per layer.
    blocks_freed, peak_request
        Blocks that rounds gave back, and the most that one finished request held (blocks).
    round_seconds
        Host time spent in rounds.
    dropped
        The share of the score mass that rounds drop.
    closed
        Requests that have finished, were aborted or retracted; the number of the newest record.
    finished
        Their records, oldest first.
    publish
        Called when totals have changed; with the seconds, where that was a launch.
    """

    evicted: list[int]
    rounds: int = 0
    launches: int = 0
    requests_pruned: int = 0
    retracted: int = 0
    blocks_freed: int = 0
    peak_request: int = 0
    round_seconds: float = 0.0
    dropped: Dropped = field(default_factory=Dropped)
    closed: int = 0
    finished: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=FINISHED))
    publish: Callable[[float | None], None] = lambda seconds: None

    @property
    def last_finished(self) -> dict[str, Any] | None:
        """The newest record."""
        return self.finished[-1] if self.finished else None

    def count_launch(self, states: Sequence[RequestState], plans: Sequence[RoundPlan], result: RoundResult) -> None:
        """Count a launch; ``states`` are those before it."""
        self.launches += 1
        self.rounds += len(plans)
        self.blocks_freed += result.freed.numel()
        self.dropped.add(result.mass)
        self.requests_pruned += sum(state.rounds == 0 for state in states)
        for plan in plans:
            for layer, (n, k) in enumerate(zip(plan.candidates, plan.kept, strict=True)):
                self.evicted[layer] += n - k

    def spend(self, seconds: float) -> None:
        """Count the host time that the rounds of a step took."""
        self.round_seconds += seconds
        self.dropped.settle()
        self.publish(seconds)

    def record(self, state: RequestState) -> None:
        """Keep what a request whose row is freed has held."""
        self.closed += 1
        self.peak_request = max(self.peak_request, state.peak)
        self.finished.append(
            {
                "number": self.closed,
                "rid": state.rid,
                "rounds": state.rounds,
                "held_peak": state.peak,
                "stock_peak": state.length,
                "evicted_per_layer": list(state.evicted),
                "steps": state.steps,
                "own_held_mean": state.held_sum / max(state.steps, 1),
                "own_stock_mean": state.stock_sum / max(state.steps, 1),
            }
        )
        self.publish(None)

    def records_after(self, number: int) -> dict[str, Any]:
        """Return the records newer than ``number``, and the number of the newest: where the next reading goes on."""
        return {"requests": [r for r in self.finished if r["number"] > number], "newest": self.closed}
