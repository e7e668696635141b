"""Rounds when the pool is short (``rounds.when: pressure``): who gives, how much, and what admission may count on.

Order under shortage: cached prefixes that nobody uses go first (SGLang's allocator evicts them by itself), running
requests above their floor second, in one launch, and retraction takes what is still missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lethe_sglang.cache.layout import RoundPlan, ceil_div, page_ceil
from lethe_sglang.cache.ledger import RequestState
from lethe_sglang.cache.shares import Claim, freed, share_of
from lethe_sglang.kernels.table import NEVER

if TYPE_CHECKING:
    from lethe_sglang.engine.runtime import Runtime

Giver = tuple[Any, RequestState]
"""SGLang's request and its state."""

Fence = Callable[[], None]
"""Orders what follows behind the forward in flight; called before rows change, and only then."""


def _nothing() -> None:
    pass


class Pressure:
    """The events of one scheduler.

    Parameters
    ----------
    runtime
        Of this process.

    Attributes
    ----------
    events
        How often the pool was short and running requests gave.
    evicted
        Cells that the events evicted, over all layers.
    share
        T of the last event, recent window included (tokens, mean over the layers); None before the first.
    last
        When it was (``time.monotonic`` seconds).
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.events = 0
        self.evicted = 0
        self.share: int | None = None
        self.last: float | None = None
        self._scheduler: Any = None
        self._fence: Fence = _nothing
        self._running: Any = None

    # -- what there is ----------------------------------------------------------------------------------------------

    def givers(self, scheduler: Any, batch: Any) -> list[Giver]:
        """Return the running requests that a round may take from now.

        A request is left alone until it is followed, which is at its second decode step, once it has finished, and
        when the result in flight will finish it.
        """
        finishing = {id(req) for req in scheduler._reqs_finishing_inflight(batch)}
        found = []
        for req in batch.reqs:
            state = self.runtime.ledger.requests.get(req.kv.req_pool_idx) if req.kv.holds_kv else None
            if state is not None and state.budgets and not req.finished() and id(req) not in finishing:
                self.runtime.renew(req, state)  # what it gives, and what admission counts on, is by the same budget
                found.append((req, state))
        return found

    def at_floors(self, givers: Iterable[Giver]) -> int:
        """Count the blocks that rounds would free now if every request were taken down to its floor."""
        return sum(freed(plan) for giver in givers if (plan := self._plan(giver, 0)) is not None)

    def surplus(self, givers: Iterable[Giver]) -> int:
        """Count the blocks that requests hold above what each may need in the end: its bound at its floor."""
        runtime = self.runtime
        return sum(
            max(runtime.own_blocks(req) - runtime.bound(req, int(req.kv.cache_protected_len), state), 0)
            for req, state in givers
        )

    def at_floor(self) -> int:
        """Count the running requests that a round has taken down to their floor."""
        states = self.runtime.ledger.requests.values()
        return sum(bool(s.rounds) and sum(s.kept) <= sum(s.budgets) for s in states)

    def report(self) -> dict[str, Any]:
        """Say what ``/server_info`` shows.

        Returns
        -------
        dict
            ``events``, ``share`` (tokens, None before the first event), ``at_floor`` (requests now),
            ``tokens_evicted`` (mean over the layers), ``last_event_s`` (seconds since the last event, or None).
        """
        return {
            "events": self.events,
            "share": self.share,
            "at_floor": self.at_floor(),
            "tokens_evicted": round(self.evicted / self.runtime.num_layers, 1),
            "last_event_s": None if self.last is None else round(time.monotonic() - self.last, 3),
        }

    # -- an event ---------------------------------------------------------------------------------------------------

    def relieve(self, givers: Sequence[Giver], lacking: int, steppers: int, allocator: Any, fence: Fence) -> None:
        """Free what is missing, and room for the next ``interval`` steps, as far as that is above the floors.

        Parameters
        ----------
        givers
            See :meth:`givers`.
        lacking
            Blocks that the allocator lacks now, unused cached prefixes counted as there.
        steppers
            Requests that will decode in the next steps.
        allocator
            SGLang's slot allocator.
        fence
            See :data:`Fence`.
        """
        runtime = self.runtime
        needed = lacking + steppers * runtime.ledger.interval
        planned = self._plans(givers, needed)
        if not planned:
            return
        fence()
        runtime.carry_out([(state, plan) for (_, state), plan in planned], allocator)
        for (req, _), plan in planned:
            req.skip_radix_cache_insert = True  # nothing with holes enters the tree
            self.evicted += sum(plan.candidates) - sum(plan.kept)
        self.events += 1
        self.last = time.monotonic()

    def _plans(self, givers: Sequence[Giver], needed: int) -> list[tuple[Giver, RoundPlan]]:
        """Plan the rounds of all requests above the share that frees ``needed`` blocks, or of all above their floors.

        Where layers keep unequally the arithmetic of shares is not exact, so the plans themselves are counted.
        """
        runtime, page_size = self.runtime, self.runtime.page_size
        share = share_of([self._claim(giver) for giver in givers], needed, page_size)
        while True:
            plans = [(giver, plan) for giver in givers if (plan := self._plan(giver, share)) is not None]
            missing = needed - sum(freed(plan) for _, plan in plans)
            if missing <= 0 or share == 0:
                break
            share = max(share - max(page_size, ceil_div(missing, len(givers))), 0)
        if plans:
            lowest = min(runtime.override_of(req).budget for (req, _), _ in plans)
            self.share = max(share + runtime.config.recent, lowest)
        return plans

    def _claim(self, giver: Giver) -> Claim:
        req, state = giver
        nothing = self.runtime.ledger.plan(state, int(req.kv.kv_committed_len), (0,) * len(state.budgets))
        return Claim(freed(nothing), self.runtime.override_of(req).budget - self.runtime.config.recent, state.rest)

    def _plan(self, giver: Giver, share: int) -> RoundPlan | None:
        """Plan a round that leaves a request its share (tokens besides the recent window), at least its floor.

        None for a request that holds no more, whatever single layers hold, or that a round would free nothing of.
        """
        req, state = giver
        runtime, limits = self.runtime, state.budgets
        floor = runtime.override_of(req).budget - runtime.config.recent
        if share > floor:
            limits = runtime.ledger.limits(state, runtime.scaled(share))
        plan = runtime.plan(state, int(req.kv.kv_committed_len), limits)
        held = freed(plan) + plan.new_packed
        above = held > page_ceil(max(share, floor) + state.rest, runtime.page_size)
        return plan if above and freed(plan) > 0 else None

    # -- the two moments --------------------------------------------------------------------------------------------

    def before_decode(self, scheduler: Any, batch: Any, fence: Fence) -> None:
        """Relieve the pool before a decode step that it could not serve.

        Where a result in flight will finish a request, SGLang skips one step instead, and its memory comes back.
        """
        finishing = {id(req) for req in scheduler._reqs_finishing_inflight(batch)}
        going_on = [i for i, req in enumerate(batch.reqs) if id(req) not in finishing]
        room = available(batch)
        lacking = batch.new_tokens_required_next_decode(going_on) - room
        givers: list[Giver] = []
        if lacking > 0 and not finishing:
            givers = self.givers(scheduler, batch)
            self.relieve(givers, lacking, len(going_on), scheduler.token_to_kv_pool_allocator, fence)
            room = available(batch)
        if self.runtime.ledger.window is not None:
            self._listen(givers or self.givers(scheduler, batch), room // max(len(going_on), 1))

    def admits(self, scheduler: Any, fence: Fence) -> None:
        """Note whose prefills :meth:`before_prefill` will make room for."""
        self._scheduler, self._fence = scheduler, fence

    def lend(self, running: Any) -> tuple[int, int]:
        """Say what admission may count on beside free memory: in the end, and at once (blocks).

        ``running`` is the batch whose requests give.
        """
        self._running = running
        givers = self.givers(self._scheduler, running)
        return self.surplus(givers), self.at_floors(givers)

    def before_prefill(self, batch: Any) -> None:
        """Relieve the pool before a prefill that admission has let in because running requests can give."""
        running, page = self._running, self.runtime.page_size
        if running is None or running.is_empty():
            return
        needed = sum(page_ceil(req.extend_end, page) - page_ceil(req.prefix_len, page) for req in batch.reqs)
        lacking = needed - available(batch)
        if lacking > 0:
            steppers = len(running.reqs) + len(batch.reqs)
            givers = self.givers(self._scheduler, running)
            self.relieve(givers, lacking, steppers, batch.token_to_kv_pool_allocator, self._fence)

    def _listen(self, givers: Iterable[Giver], runway: int) -> None:
        """Let a policy with a window hear the last steps before the pool is short, ``runway`` steps from now."""
        ledger = self.runtime.ledger
        window = ledger.window or 0
        for req, state in givers:
            committed = int(req.kv.kv_committed_len)
            if runway <= window and state.listens_from > committed:
                ledger.listen(state, committed)
            elif runway > 2 * window and state.listens_from <= committed:
                ledger.listen(state, NEVER)


def available(batch: Any) -> int:
    """Blocks that an allocation finds: free ones, and those of cached prefixes that nobody uses."""
    return int(batch.token_to_kv_pool_allocator.available_size() + batch.tree_cache.evictable_size())
