"""Allocation breakpoint: the scores that a round has ranked settle the layers' budgets of the request's next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lethe_sglang.allocation.breakpoint import breakpoint_budgets, breakpoint_counts
from lethe_sglang.cache.layout import RoundPlan
from lethe_sglang.cache.ledger import Ledger, RequestState

if TYPE_CHECKING:
    from lethe_sglang.cache.rounds import RoundResult


class Pending(NamedTuple):
    """Counts of a round that travel to the host.

    ``counts`` is int32 ``[L]`` on the host once ``event`` (None on a CPU) has been reached; ``observed`` are the
    candidates they were taken over.
    """

    counts: torch.Tensor
    event: Any
    observed: tuple[int, ...]


def plan(
    ledger: Ledger, state: RequestState, committed: int, floor: int, limits: Sequence[int] | None = None
) -> RoundPlan:
    """Plan a round by what the request's last one has counted; the first keeps the limits as they are.

    Parameters
    ----------
    ledger, state
        The request.
    committed
        Tokens whose KV is written or in flight.
    floor
        Smallest k_l.
    limits
        Most cells of each layer, whose mean the layers share; None is the request's own budgets.
    """
    limits = limits or state.budgets
    pending = state.pending
    if not isinstance(pending, Pending):
        return ledger.plan(state, committed, limits)
    if pending.event is not None:
        pending.event.synchronize()  # reached long ago; polling instead would let ranks diverge
    layers = len(limits)
    everything = ledger.plan(state, committed, (committed,) * layers)
    mean, floor = sum(limits) // layers, floor + state.rest  # the rest of the prompt is on top of any budget
    budgets, flat = breakpoint_budgets(pending.counts.tolist(), pending.observed, everything.candidates, mean, floor)
    state.thresholds = [2 * t if f else b for t, b, f in zip(state.thresholds, state.budgets, flat, strict=True)]
    return ledger.plan(state, committed, budgets)


def count(result: RoundResult, plans: Sequence[RoundPlan]) -> list[Pending]:
    """Count what a launch has ranked, a request each; nothing waits for the device."""
    score = result.salience.nan_to_num().masked_fill(~result.valid, float("-inf"))
    pinned = torch.arange(score.shape[2], device=score.device) < result.pinned.view(1, -1, 1)
    counts = breakpoint_counts(score, pinned.expand_as(score), result.valid.sum(-1))
    event = None
    if counts.device.type != "cpu":
        host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
        event = torch.get_device_module(counts.device).Event()
        counts = host.copy_(counts, non_blocking=True)
        event.record()
    return [Pending(counts[:, i], event, p.candidates) for i, p in enumerate(plans)]
