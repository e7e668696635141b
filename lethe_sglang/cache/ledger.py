"""What the host knows of every decoding request, and its mirror on the device.

Owns: per-request layout and counters, the decision when a round is due, the device table that attention reads.
Does not own: slots (SGLang's allocator), row entries (``req_to_token``), cells (the pool).

All decisions use host numbers only; identities of kept tokens stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import sub
from typing import NamedTuple

import numpy as np
import torch

from lethe_sglang.cache.arrivals import Observed
from lethe_sglang.cache.layout import RoundPlan, RowLayout, offsets, page_ceil, page_floor, survivors
from lethe_sglang.cache.phase import Phase
from lethe_sglang.cache.upload import columns_of, upload
from lethe_sglang.kernels import table
from lethe_sglang.kernels.table import NEVER


@dataclass(slots=True)
class RequestState:
    """One request that may be evicted from.

    Attributes
    ----------
    rid
        SGLang's request id.
    row
        Its row in ``req_to_token``.
    layout
        Owners of the row's positions.
    kept
        k_l: packed cells per layer.
    budgets
        Largest k_l a round may leave, per layer, the rest of the prompt's last page included.
    rest
        Tokens of the kept prompt behind the prefix, which ends at a page: own cells that are always kept.
    pinned
        First own cells that are always kept: ``rest``, the sinks that lie behind the prefix, and the own sinks.
    stagger
        Tokens by which its first round, and so all others, come later than they might: requests that start together
        would stall one step with all their rounds. Any number; it counts modulo what there is room for.
    due_at
        Committed length (tokens) at which the next round is due; ``NEVER`` for a request that is not evicted from.
    rounds, pruned_at
        Rounds so far, and the committed length at the last one (tokens).
    evicted
        Cells evicted so far, per layer.
    allocated
        Row positions in use when they were last counted, in whole pages (tokens).
    peak
        Most blocks held at once, shared prefix included (blocks).
    length
        Most row positions in use at once: what stock would hold (tokens).
    steps
        Decode steps seen so far.
    held_sum, stock_sum
        Own blocks held, and those that stock would hold, summed over those steps (blocks).
    thresholds
        Per layer, the candidates above which a round is due. Equal to ``budgets`` but under breakpoint allocation.
    pending
        Breakpoint allocation: the last round's counts on their way to the host.
    listens_from
        Sequence length behind which steps are scored, where the policy listens to a window.
    version
        Of the server's configuration, as the runtime counts them.
    """

    rid: str
    row: int
    layout: RowLayout
    kept: tuple[int, ...]
    budgets: tuple[int, ...] = ()
    rest: int = 0
    pinned: int = 0
    stagger: int = 0
    due_at: int = NEVER
    rounds: int = 0
    pruned_at: int = 0
    evicted: list[int] = field(default_factory=list)
    allocated: int = 0
    peak: int = 0
    length: int = 0
    steps: int = 0
    held_sum: int = 0
    stock_sum: int = 0
    thresholds: list[int] = field(default_factory=list)
    pending: object | None = None
    listens_from: int = NEVER
    version: int = 0

    def observe(self, allocated: int, page_size: int) -> None:
        """Note the blocks held with ``allocated`` row positions in use."""
        self.allocated = page_ceil(allocated, page_size)
        self.length = max(self.length, self.allocated)
        self.peak = max(self.peak, self.held)

    @property
    def held(self) -> int:
        """Blocks held, shared prefix included, with the positions that were in use when they were last counted."""
        return self.allocated - self.layout.dead_len

    def count_step(self, allocated: int, page_size: int) -> None:
        """Count a decode step that begins with ``allocated`` row positions in use: of every request, in every step."""
        self.allocated = allocated = page_ceil(allocated, page_size) if page_size > 1 else allocated
        own, dead = allocated - self.layout.prefix, self.layout.tail - self.layout.prefix - self.layout.packed
        self.length, self.peak = max(self.length, allocated), max(self.peak, allocated - dead)
        self.steps, self.stock_sum, self.held_sum = self.steps + 1, self.stock_sum + own, self.held_sum + own - dead


class Mark(NamedTuple):
    """What a line of the device table follows from; see ``kernels/table.py``. That of an intact row has zeros only."""

    kept: tuple[int, ...]
    prefix: int = 0
    packed: int = 0
    tail: int = 0
    score_from: int = 0
    score_after: int = 0


class Ledger:
    """Per-request state on the host and its device table.

    Parameters
    ----------
    num_rows
        Rows of ``req_to_token``, row 0 (padding) included.
    num_layers
        Layers of the pool.
    page_size
        SGLang's page size (tokens).
    recent
        R: the recent window (tokens), never evicted.
    interval
        Tokens that must leave the recent window between two rounds.
    device
        Where the table lives.
    pack_always
        Test aid: a round is due every interval even if nothing has to be evicted.
    window
        Decode steps before a round that the policy listens to; None is all of them.
    narrow
        Layers that never have excess (``layout.packed_blocks``); None is none of them.
    on_demand
        No round is due by a request's length: whoever needs the memory asks for them (``cache/shares.py``).

    Attributes
    ----------
    multiple
        Layers keep a multiple of this many cells: 1, or the page size where attention reads pages.
    requests
        Row -> state of every request that is followed.
    observed
        What the prefill batch that is being run initialises scores of (private prompts and re-prefills).
    phase
        Which decode steps are scored.
    table
        int32 ``[num_rows, columns]``: the device table (``kernels/table.py``).
    """

    def __init__(
        self,
        num_rows: int,
        num_layers: int,
        page_size: int,
        recent: int,
        interval: int,
        device: torch.device | str,
        pack_always: bool = False,
        window: int | None = None,
        narrow: Sequence[bool] | None = None,
        on_demand: bool = False,
    ) -> None:
        self.num_layers = num_layers
        self.page_size = page_size
        self.multiple = 1
        self.configure(recent, interval, pack_always, window, narrow, on_demand)
        self.phase = Phase()
        self.table = torch.zeros((num_rows, table.width(num_layers)), dtype=torch.int32, device=device)
        self.requests: dict[int, RequestState] = {}
        self.observed: list[Observed] = []
        self._announced: set[int] = set()
        self._dirty: dict[int, Mark] = {}

    def configure(
        self,
        recent: int,
        interval: int,
        pack_always: bool,
        window: int | None,
        narrow: Sequence[bool] | None,
        on_demand: bool = False,
    ) -> None:
        """Set what decides about rounds; see the class for the meaning. Followed requests are to be renewed."""
        self.narrow = (False,) * self.num_layers if narrow is None else tuple(narrow)
        self.recent = recent
        self.interval = page_ceil(interval, self.page_size)
        self.pack_always = pack_always
        self.window = window
        self.on_demand = on_demand

    # -- life of a row ----------------------------------------------------------------------------------------------

    def announce(self, row: int, score_from: int) -> None:
        """Say where the first decode step scores a row that is being prefilled; it is followed from the second on.

        Without this the step would score a shared prefix, too, and several requests would write its states at once.
        """
        self._announced.add(row)
        self._dirty[row] = Mark((0,) * self.num_layers, score_from=score_from)

    def open(
        self,
        rid: str,
        row: int,
        prefix: int,
        budgets: tuple[int, ...] | None,
        committed: int = 0,
        rest: int = 0,
        pinned: int = 0,
        stagger: int = 0,
    ) -> RequestState:
        """Start following a request whose prefill is done.

        Parameters
        ----------
        rid, row
            SGLang's.
        prefix
            P, protected positions in whole pages (tokens).
        budgets
            Most k_l a round may leave, ``rest`` not counted; None means that the request is never evicted from.
        committed
            Tokens whose KV is written or in flight.
        rest, pinned, stagger
            See :class:`RequestState`.
        """
        state = RequestState(
            rid=rid,
            row=row,
            layout=RowLayout(prefix=prefix, packed=0, tail=prefix),
            kept=(0,) * self.num_layers,
            rest=rest,
            pinned=pinned,
            stagger=stagger,
            evicted=[0] * self.num_layers,
        )
        self.requests[row] = state
        if budgets is None:
            self._mark(state, committed)
        else:
            self.renew(state, budgets, committed)
        return state

    def close(self, rows: Iterable[int]) -> list[RequestState]:
        """Forget rows that SGLang frees; returns what was known of them."""
        closed = []
        for row in rows:
            state = self.requests.pop(row, None)
            if state is not None:
                closed.append(state)
            if state is not None or row in self._announced:
                self._dirty[row] = Mark((0,) * self.num_layers)
            self._announced.discard(row)
        return closed

    def dead_len(self, row: int | None) -> int:
        """Dead positions of a row (0 for a row that is not followed)."""
        state = self.requests.get(row) if row is not None else None
        return state.layout.dead_len if state is not None else 0

    def live(self, row: int | None, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """``ranges`` of a row less its dead positions."""
        state = self.requests.get(row) if row is not None else None
        return list(ranges) if state is None else state.layout.live(ranges)

    # -- rounds -----------------------------------------------------------------------------------------------------

    def plan(self, state: RequestState, committed: int, budgets: Sequence[int]) -> RoundPlan:
        """Plan a due round of one request.

        Parameters
        ----------
        state
            The request.
        committed
            Tokens whose KV is written or in flight.
        budgets
            Most cells each layer keeps this round.
        """
        layout = state.layout
        new_tail = max(page_floor(committed - self.recent, self.page_size), layout.tail)
        candidates, kept, packed = survivors(
            state.kept, new_tail - layout.tail, tuple(budgets), layout.packed, self.narrow, self.page_size
        )
        return RoundPlan(
            committed=committed,
            row=state.row,
            prefix=layout.prefix,
            old_packed=layout.packed,
            old_tail=layout.tail,
            new_packed=packed,
            new_tail=new_tail,
            old_kept=state.kept,
            candidates=candidates,
            kept=kept,
            pinned=state.pinned,
        )

    def commit(self, state: RequestState, plan: RoundPlan) -> None:
        """Record a round that has been carried out."""
        state.layout = RowLayout(prefix=plan.prefix, packed=plan.new_packed, tail=plan.new_tail)
        state.kept = plan.kept
        state.rounds += 1
        state.pruned_at = plan.committed
        state.evicted = [e + n - k for e, n, k in zip(state.evicted, plan.candidates, plan.kept, strict=True)]
        state.due_at = self._due_at(state)
        self._mark(state, plan.committed)

    def _due_at(self, state: RequestState) -> int:
        """Find the committed length at which ``interval`` tokens have left the window and a budget is exceeded.

        That is: some layer over its threshold, or all layers together over the sum of their budgets.
        """
        if self.on_demand:
            return NEVER
        layer_room = min(map(sub, state.thresholds, state.kept))
        mean_room = (sum(state.budgets) - sum(state.kept)) // self.num_layers
        room = 0 if self.pack_always else min(layer_room, mean_room)
        leaving = max(self.interval, room + 1)
        if state.rounds == 0:  # no later than a settled request, which holds an interval more than its budget at most
            leaving += state.stagger % max(room + self.interval - leaving + 1, 1)
        leaving = page_ceil(leaving, self.page_size)
        return state.layout.tail + leaving + self.recent

    def renew(self, state: RequestState, budgets: tuple[int, ...], committed: int) -> None:
        """Go over to new budgets, and to the window and interval of :meth:`configure`, with the next round.

        That round comes an interval after the last one at the earliest, and as late as the *new* window requires: its
        tail is never before the present one. A window that the policy listens to goes on if it has begun.

        Parameters
        ----------
        state
            A request that is evicted from.
        budgets, committed
            As for :meth:`open`.
        """
        state.budgets = self.limits(state, budgets)
        state.thresholds = list(state.budgets)
        state.due_at = self._due_at(state)
        self._mark(state, committed, goes_on=True)

    def limits(self, state: RequestState, budgets: Sequence[int]) -> tuple[int, ...]:
        """Return the most cells that a request's layers keep under ``budgets``, the rest of its prompt included."""
        return tuple(page_ceil(k + state.rest, self.multiple) for k in budgets)  # m is whole pages anyway

    def listen(self, state: RequestState, after: int) -> None:
        """Score a request from the sequence length ``after`` on, for a policy with a window; ``NEVER`` ends it."""
        state.listens_from = after
        self._write(state)

    # -- device table -----------------------------------------------------------------------------------------------

    def _mark(self, state: RequestState, committed: int, goes_on: bool = False) -> None:
        listens_from = 0 if self.window is None else max(state.due_at - self.window, committed)
        if not (goes_on and state.listens_from < committed == listens_from):
            state.listens_from = listens_from
        self._write(state)

    def _write(self, state: RequestState) -> None:
        layout = state.layout
        score_from = layout.prefix if state.budgets else NEVER
        place = layout.prefix, layout.packed, layout.tail
        self._dirty[state.row] = Mark(state.kept, *place, score_from, state.listens_from)

    @property
    def dirty(self) -> bool:
        """Whether the device table lags behind the host."""
        return bool(self._dirty)

    def flush(self) -> None:
        """Write the lines that changed to the device table: one copy, no synchronisation."""
        if not self._dirty:
            return
        marks = columns_of(list(self._dirty.values()))
        excess, holes = offsets(marks["kept"], marks["packed"])
        lines = table.numbers(marks | {"excess": excess, "holes": holes})
        new = upload(np.column_stack((list(self._dirty), lines)), self.table.device)
        self.table[new[:, 0]] = new[:, 1:]
        self._dirty.clear()
