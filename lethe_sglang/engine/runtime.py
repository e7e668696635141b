"""One scheduler process's eviction state: configuration, policy, ledger, pool, and the rounds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from lethe_sglang.allocation.budgets import scale
from lethe_sglang.cache import breakpoints
from lethe_sglang.cache.arrivals import stagger_of
from lethe_sglang.cache.layout import (
    RoundPlan,
    RowLayout,
    narrow_layers,
    page_ceil,
    pinned_cells,
    protected,
    request_bound,
)
from lethe_sglang.cache.ledger import Ledger, RequestState
from lethe_sglang.cache.pool import PackedKVPool
from lethe_sglang.cache.rounds import RoundResult, groups, run_round
from lethe_sglang.config import ConfigError, EvictionConfig, RequestOverride, parse_request
from lethe_sglang.engine.counters import Counters, lives
from lethe_sglang.engine.monitor import Monitor
from lethe_sglang.engine.observing import watching
from lethe_sglang.engine.pressure import Pressure
from lethe_sglang.engine.ranks import Ranks
from lethe_sglang.engine.reconfigure import change
from lethe_sglang.observers.base import Observer

if TYPE_CHECKING:
    from lethe_sglang.attention.length_classes import LengthClasses


class Runtime:
    """Everything that one scheduler process knows about eviction.

    Parameters
    ----------
    config
        The resolved configuration.
    budgets
        k_l of every layer, first layer first.
    page_size
        SGLang's page size (tokens).
    context_length
        Longest sequence the server takes (tokens).
    measures
        Whether the server measures a profile: it evicts nothing.
    captured
        Whether decode steps are replayed from CUDA graphs, which hold how the policy scores.
    deterministic
        Whether replies may not depend on what else is served (``--enable-deterministic-inference``).

    Attributes
    ----------
    version
        How often the configuration has changed; a followed request is brought to it at its next decode step.
    step_rows
        Rows of the decode step whose forward is being prepared (host numbers).
    backends
        Attention backends, which hold the policy's rule of accumulation.
    length_classes
        The backends' maps from layers to plans and lists, which no configuration may contradict.
    observers
        Watch what happens; none in production.
    pressure
        Rounds when the pool is short; idle unless ``rounds.when`` is ``pressure``.
    monitor
        The live quality signal; idle where ``monitor.fraction`` is 0.
    """

    pool: PackedKVPool
    ledger: Ledger
    req_to_token: torch.Tensor

    def __init__(
        self,
        config: EvictionConfig,
        budgets: tuple[int, ...],
        page_size: int,
        context_length: int | None,
        measures: bool = False,
        captured: bool = False,
        deterministic: bool = False,
    ) -> None:
        self.num_layers = len(budgets)
        self.page_size = page_size
        self.context_length = context_length
        self.measures = measures
        self.captured = captured
        self.deterministic = deterministic
        self.version = 0
        self.step_rows: list[int] = []
        self.backends: list[Any] = []
        self.length_classes: list[LengthClasses] = []
        self.observers: list[Observer] = []
        self.counters = Counters(evicted=[0] * self.num_layers)
        self.pressure = Pressure(self)
        self.monitor = Monitor(self)
        self.ranks = Ranks()
        self._configure(config, budgets)

    # -- configuration ----------------------------------------------------------------------------------------------

    def _configure(self, config: EvictionConfig, budgets: tuple[int, ...]) -> None:
        self.config, self.budgets = config, budgets
        self.policy = config.built_policy

    def reconfigure(self, config: EvictionConfig, budgets: tuple[int, ...], busy: tuple[int, int]) -> dict[str, Any]:
        """Go over to another configuration, if nothing stands against it.

        Requests that are followed keep what they have until their next round, which is planned by the new budget,
        interval and recent window (:meth:`follow`).

        Parameters
        ----------
        config, budgets
            As at the start.
        busy
            Requests that run and that wait.

        Returns
        -------
        dict
            ``changed``: dotted key -> old and new value; ``effective``: ``now``, or ``next round`` of each request.

        Raises
        ------
        ConfigError
            With the reason; then nothing has changed.
        """
        changed = change(self, config, budgets, busy)
        if changed:
            self._configure(config, budgets)
            self._start_ledger()
            self.monitor.configure()
            self.version += 1
            for backend in self.backends:
                backend.accumulation = self.policy.accumulation
        rounds = any(option.startswith(("budget.", "rounds.")) for option in changed)
        return {"changed": changed, "effective": "next round" if rounds and any(busy) else "now"}

    def tracked(self) -> tuple[bool, bool, bool]:
        """Say which states a cell carries: score, position (of packed cells), memory."""
        policy, debug, everything = self.policy, self.config.debug, self.config.pool.states == "all"
        positions = debug.shadow or debug.kept_hash or debug.record_kept
        return (
            everything or policy.accumulation is not None,
            everything or positions or policy.uses_position,
            everything or policy.uses_memory,
        )

    def _start_ledger(self) -> None:
        rule, config, rounds = self.policy.accumulation, self.config, self.config.rounds
        window, every = (None, 1) if rule is None else (rule.window, rule.in_phase)
        pack = config.debug.pack_always
        self.ledger.configure(config.recent, rounds.interval, pack, window, self._narrow(), rounds.by_pressure)
        self.ledger.phase.configure(every, by_length=self.deterministic)

    def _narrow(self) -> tuple[bool, ...]:
        if self.length_classes:  # what a backend has settled stays
            return self.length_classes[0].narrow_layers()
        unknown = self.config.budget.allocation == "breakpoint"
        return (False,) * self.num_layers if unknown else _narrow_layers(self.budgets)

    def attach(self, pool: PackedKVPool, req_to_token: torch.Tensor) -> None:
        """Bind to the pool and the rows SGLang has built; once, whatever number of backends asks."""
        if getattr(self, "pool", None) is pool and self.req_to_token is req_to_token:
            return
        self.pool, self.req_to_token = pool, req_to_token
        size, config = (req_to_token.shape[0], self.num_layers, self.page_size), self.config
        self.ledger = Ledger(*size, config.recent, config.rounds.interval, req_to_token.device)
        self._start_ledger()
        self.observers[:] = watching(self)

    # -- requests ---------------------------------------------------------------------------------------------------

    def evicts(self, req: Any) -> bool:
        """Whether a request is evicted from. Beams are not, by whatever door they came: their rows share blocks."""
        return self.override_of(req).mode == "on" and req.beam_group is None

    def override_of(self, req: Any) -> RequestOverride:
        """Return what a request asks for, under the configuration of now.

        It is parsed once. One that asks for what is not legal is not evicted from (see :meth:`check`); a budget that a
        later configuration does not allow any more becomes the nearest that it does.
        """
        known: tuple[int, RequestOverride, RequestOverride] | None = getattr(req, "_kv_evict", None)
        if known is None or known[0] != self.version:
            asked = self._asked(req) if known is None else known[1]
            known = req._kv_evict = self.version, asked, asked.under(self.config)
        return known[2]

    def _asked(self, req: Any) -> RequestOverride:
        try:
            asked = parse_request(req.sampling_params.custom_params, self.config, self.context_length)
        except ConfigError:
            return RequestOverride(mode="none", budget=self.config.budget.tokens)
        return replace(asked, mode="none") if self.measures else asked

    def check(self, req: Any) -> None:
        """Check what a request asks for: the front door has, but requests may come by others.

        Raises
        ------
        ConfigError
            One line that names the option; it is this request's error and nobody else's.
        """
        parse_request(req.sampling_params.custom_params, self.config, self.context_length)
        self.override_of(req)  # read under the configuration that accepts it, whatever comes while it waits

    def protected(self, req: Any, tree: int) -> tuple[int, int]:
        """Divide what is never evicted of a request into P and the rest of its prompt (see ``layout.protected``).

        ``tree`` is what the radix tree owns of it. The prompt is that of the request as it came in: what it has
        generated before a retraction is prefilled with it and stays evictable.
        """
        prompt = len(req.origin_input_ids) if self.config.retain.prompt == "keep" else 0
        return protected(tree, prompt, self.page_size)

    def bound(self, req: Any, tree: int, state: RequestState | None = None) -> int:
        """Most blocks that the tree does not own and the request holds while it decodes.

        Parameters
        ----------
        req
            The request; its own budget counts, not the server's.
        tree
            Positions that the radix tree owns (tokens).
        state
            Of a request that is followed: after a change of the configuration it may hold more than its new budget
            until its next round.
        """
        prefix, rest = self.protected(req, tree)
        most = _most(self.budgets_of(req) or (), self._narrow())
        budget = max(self.override_of(req).budget, self.config.recent + most) + rest
        bound = prefix - tree + request_bound(budget, self.config.rounds.interval, self.page_size)
        if state is None or self.ledger.on_demand:
            return bound
        return max(bound, page_ceil(state.due_at + 1, self.page_size) - tree - state.layout.dead_len)

    def budgets_of(self, req: Any) -> tuple[int, ...] | None:
        """Per-layer k_l of a request, None if it is not evicted from."""
        override = self.override_of(req)
        if not self.evicts(req):
            return None
        return self.scaled(override.budget - self.config.recent)

    def scaled(self, mean: int) -> tuple[int, ...]:
        """Per-layer k_l of a request whose layers keep ``mean`` tokens on average besides the recent window."""
        if mean == self.config.scored:
            return self.budgets
        return _scaled(self.budgets, mean, self.config.floor)

    def own_blocks(self, req: Any) -> int:
        """Blocks that a running request holds now and the radix tree does not own."""
        kv = req.kv
        return int(kv.kv_allocated_len - kv.cache_protected_len - self.ledger.dead_len(kv.req_pool_idx))

    # -- rounds -----------------------------------------------------------------------------------------------------

    def follow(self, req: Any) -> RequestState:
        """Look up a decoding request's state, opening it at its first sight; bring it to a new configuration."""
        kv = req.kv
        state = self.ledger.requests.get(kv.req_pool_idx)
        if state is None:
            prefix, rest = self.protected(req, int(kv.cache_protected_len))
            state = self.ledger.open(
                req.rid,
                kv.req_pool_idx,
                prefix,
                self.budgets_of(req),
                committed=int(kv.kv_committed_len),
                rest=rest,
                pinned=pinned_cells(prefix, rest, self.config.retain.sinks, self.config.retain.own_sinks),
                stagger=stagger_of(req.origin_input_ids),
            )
            state.version = self.version
            lives(req).append(state)
        self.renew(req, state)
        state.count_step(kv.kv_allocated_len, self.page_size)
        return state

    def renew(self, req: Any, state: RequestState) -> None:
        """Bring a followed request to the configuration of now."""
        if state.version != self.version:
            if budgets := self.budgets_of(req):
                self.ledger.renew(state, budgets, int(req.kv.kv_committed_len))
            state.version = self.version

    def run_rounds(self, due: Sequence[tuple[RequestState, int]], allocator: Any) -> None:
        """Carry out the rounds of all due requests, (state, committed length) each; see :meth:`carry_out`."""
        self.carry_out([(state, self.plan(state, committed, state.budgets)) for state, committed in due], allocator)

    def carry_out(self, planned: Sequence[tuple[RequestState, RoundPlan]], allocator: Any) -> None:
        """Carry out planned rounds.

        Parameters
        ----------
        planned
            A plan for each of the requests.
        allocator
            SGLang's slot allocator; freed blocks go back to it.
        """
        started = time.perf_counter()
        states, plans = [state for state, _ in planned], [plan for _, plan in planned]
        for classes, plan in product(self.length_classes, plans):
            classes.check(plan)
        start = 0
        for size in groups(plans, self.pool.cells, self.pool.scratch_bytes):
            group = slice(start, start + size)
            self._launch(plans[group], states[group], allocator)
            start += size
        self.counters.spend(time.perf_counter() - started)

    def warm_up(self) -> None:
        """Run one round over row 0 and the padding block, which nobody reads: kernels compile now, not in service."""
        page = self.page_size
        nothing = (0,) * self.num_layers
        state = RequestState(rid="", row=0, layout=RowLayout(prefix=0, packed=0, tail=0), kept=nothing, budgets=nothing)
        if self.config.recent + 2 * page <= self.req_to_token.shape[1]:
            plan = self.ledger.plan(state, self.config.recent + 2 * page, (page,) * self.num_layers)
            self._run([plan])

    def _run(self, plans: list[RoundPlan]) -> RoundResult:
        mean = self.ranks.mean if self.ranks.size > 1 else None
        return run_round(plans, self.pool.cells, self.req_to_token, self.policy, mean, self.pool.scratch)

    def plan(self, state: RequestState, committed: int, limits: tuple[int, ...]) -> RoundPlan:
        """Plan a round of a request that leaves ``limits`` cells a layer, or as many in all where scores share them."""
        if self.config.budget.allocation == "breakpoint":
            return breakpoints.plan(self.ledger, state, committed, self.config.floor, limits)
        return self.ledger.plan(state, committed, limits)

    def _launch(self, plans: list[RoundPlan], states: list[RequestState], allocator: Any) -> None:
        result = self._run(plans)
        allocator.free_segment(result.freed, start_pos=0)
        self.counters.count_launch(states, plans, result)
        for state, plan in zip(states, plans, strict=True):
            self.ledger.commit(state, plan)
        if self.config.budget.allocation == "breakpoint":
            for state, pending in zip(states, breakpoints.count(result, plans), strict=True):
                state.pending = pending
        for observer in self.observers:
            observer.on_round(states, plans, result)

    # -- end of a request -------------------------------------------------------------------------------------------

    def released(self, row: int, allocated: int) -> None:
        """Note that SGLang releases a row's KV: the request finished, was aborted or retracted."""
        state = self.ledger.requests.get(row)
        if state is not None:
            state.observe(allocated, self.page_size)

    def close_rows(self, rows: Sequence[int]) -> None:
        """Forget rows that SGLang frees."""
        for observer in self.observers:
            observer.on_close(rows)
        for state in self.ledger.close(rows):
            self.counters.record(state)


@lru_cache(maxsize=1024)
def _most(budgets: tuple[int, ...], narrow: tuple[bool, ...]) -> int:
    """Return the largest budget of a narrow layer, which is at most a few tokens more than the mean; 0 without one."""
    return max((k for k, is_narrow in zip(budgets, narrow, strict=False) if is_narrow), default=0)


_narrow_layers, _scaled = lru_cache(maxsize=64)(narrow_layers), lru_cache(maxsize=1024)(scale)
"""Admission asks at every step, for each request that runs; requests ask for few different budgets."""

_runtime: Runtime | None = None


def set_runtime(runtime: Runtime | None) -> None:
    """Install this process's runtime (one scheduler a process)."""
    global _runtime
    _runtime = runtime


def current() -> Runtime:
    """Return this process's runtime.

    Raises
    ------
    RuntimeError
        If eviction was not started in this process.
    """
    if _runtime is None:
        raise RuntimeError("KV eviction is not running in this process")
    return _runtime
