"""One scheduler process's eviction state: configuration, policy, ledger, pool, and the rounds."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from lethe_sglang.allocation.breakpoint import breakpoint_budgets, breakpoint_counts
from lethe_sglang.allocation.budgets import scale
from lethe_sglang.attention.measure import Measurer
from lethe_sglang.cache.layout import pinned_cells, protected, request_bound
from lethe_sglang.cache.ledger import Ledger, RequestState, RoundPlan
from lethe_sglang.cache.pool import PackedKVPool
from lethe_sglang.cache.rounds import RoundResult, run_round
from lethe_sglang.cache.shadow import Shadow
from lethe_sglang.config import ConfigError, EvictionConfig, RequestOverride, parse_request
from lethe_sglang.policies import Policy

logger = logging.getLogger("lethe_sglang")

SCRATCH_FRACTION = 0.01
"""Part of the pool that one launch of a round may move at a time; more due requests are split into several."""


class Pending(NamedTuple):
    """Counts of a round that travel to the host.

    ``counts`` is int32 ``[L]`` on the host once ``event`` (None on a CPU) has been reached; ``observed`` are the
    candidates they were taken over.
    """

    counts: torch.Tensor
    event: Any
    observed: tuple[int, ...]


class Counters:
    """What happened since the server started (host numbers)."""

    def __init__(self, num_layers: int) -> None:
        self.rounds = 0
        self.launches = 0
        self.requests_pruned = 0
        self.retracted = 0
        self.evicted = [0] * num_layers
        self.blocks_freed = 0
        self.peak_request = 0
        self.round_seconds = 0.0
        self.last_finished: dict[str, Any] | None = None
        self.fingerprint = hashlib.sha256()
        self.kept_log: deque[dict[str, Any]] = deque(maxlen=256)
        self.finished: deque[dict[str, Any]] = deque(maxlen=1024)


class Runtime:
    """Everything that one scheduler process knows about eviction.

    Parameters
    ----------
    config
        The resolved configuration.
    budgets
        k_l of every layer for the configuration and each of its arms (``config.every_arm``), first layer first.
    num_layers
        Attention layers of the model (of this rank's pool).
    page_size
        SGLang's page size (tokens).
    context_length
        Longest sequence the server takes (tokens).

    Attributes
    ----------
    step_rows
        Rows of the decode step whose forward is being prepared (host numbers).
    """

    def __init__(
        self,
        config: EvictionConfig,
        budgets: Sequence[tuple[int, ...]],
        num_layers: int,
        page_size: int,
        context_length: int | None,
    ) -> None:
        self.base = config
        self.budgets_of_arms = tuple(budgets)
        self.num_layers = num_layers
        self.page_size = page_size
        self.context_length = context_length
        self.on_switch: list[Callable[[Policy], None]] = []
        self.step_rows: list[int] = []
        self.configure(config, self.budgets_of_arms[0])
        self.counters = Counters(num_layers)
        self.tp_group: Any = None
        self.tp_size = 1
        self.pool: PackedKVPool
        self.ledger: Ledger
        self.req_to_token: torch.Tensor
        self.shadow: Shadow | None = None
        self.measurer: Measurer | None = None

    # -- construction -----------------------------------------------------------------------------------------------

    def configure(self, config: EvictionConfig, budgets: tuple[int, ...]) -> None:
        """Take a configuration and its k_l; nothing else of the runtime depends on it."""
        self.config = config
        self.policy = config.built_policy
        self.budgets = budgets

    @property
    def tracked(self) -> tuple[bool, bool, bool]:
        """Which states a cell carries for any of the arms: score, position (of packed cells), memory."""
        policies = [arm.built_policy for arm in self.base.every_arm]
        debug = self.base.debug
        positions = debug.shadow or debug.fingerprints or debug.record_kept
        return (
            any(policy.accumulation is not None for policy in policies),
            positions or any(policy.uses_position for policy in policies),
            any(policy.uses_memory for policy in policies),
        )

    def switch(self, arm: int) -> None:
        """Go over to arm ``arm`` of ``debug.arms``; the server must be idle (see :meth:`check_arm`)."""
        self.check_arm(arm)
        self.configure(self.base.arm(arm), self.budgets_of_arms[arm + 1])
        self.ledger.configure(*self._rounds())
        for react in self.on_switch:
            react(self.policy)
        self.counters = Counters(self.num_layers)

    def check_arm(self, arm: int) -> None:
        """Check that the server can go over to an arm.

        Raises
        ------
        ValueError
            If there is no such arm or a request is followed.
        """
        arms = self.base.debug.arms or ()
        if not 0 <= arm < len(arms):
            raise ValueError(f"kv_evict_arm: got {arm}, debug.arms has {len(arms)}; legal: 0 to {len(arms) - 1}")
        if self.ledger.requests:
            raise ValueError("kv_evict_arm: requests are running; wait until the server is idle")

    def _rounds(self) -> tuple[int, int, bool, int | None]:
        window = None if self.policy.accumulation is None else self.policy.accumulation.window
        return self.config.recent, self.config.rounds.interval, self.config.debug.pack_always, window

    def attach(self, pool: PackedKVPool, req_to_token: torch.Tensor) -> None:
        """Bind to the pool and the rows SGLang has built; once, whatever number of backends asks."""
        if getattr(self, "pool", None) is pool and self.req_to_token is req_to_token:
            return
        self.pool, self.req_to_token = pool, req_to_token
        recent, interval, pack_always, window = self._rounds()
        self.ledger = Ledger(
            num_rows=req_to_token.shape[0],
            num_layers=self.num_layers,
            page_size=self.page_size,
            recent=recent,
            interval=interval,
            device=req_to_token.device,
            pack_always=pack_always,
            window=window,
        )
        if self.config.debug.shadow:
            self.shadow = Shadow(pool.cells, self.ledger, req_to_token)
        if self.base.debug.measure:
            self.measurer = Measurer(req_to_token.shape[0], self.num_layers, self.config.retain.sinks, pool.device)

    # -- requests ---------------------------------------------------------------------------------------------------

    def override_of(self, req: Any) -> RequestOverride:
        """Return what a request asks for (parsed once; see :meth:`check` for one that asks for what is not legal)."""
        cached: RequestOverride | None = getattr(req, "_kv_evict", None)
        if cached is None:
            try:
                cached = parse_request(req.sampling_params.custom_params, self.config, self.context_length)
            except ConfigError:
                cached = RequestOverride(mode="none", budget=self.config.budget.tokens)
            if self.base.debug.measure:
                cached = RequestOverride(mode="none", budget=cached.budget)
            req._kv_evict = cached
        return cached

    def check(self, req: Any) -> None:
        """Check what a request asks for: the front door has, but requests may come by others.

        Raises
        ------
        ConfigError
            One line that names the option; it is this request's error and nobody else's.
        """
        parse_request(req.sampling_params.custom_params, self.config, self.context_length)

    def evicts(self, req: Any) -> bool:
        """Whether a request is evicted from. Beams are not, by whatever door they came: their rows share blocks."""
        return self.override_of(req).mode == "on" and req.beam_group is None

    def protected(self, req: Any, tree: int) -> tuple[int, int]:
        """Divide what is never evicted of a request into P and the rest of its prompt (see ``layout.protected``).

        ``tree`` is what the radix tree owns of it. The prompt is that of the request as it came in: what it has
        generated before a retraction is prefilled with it and stays evictable.
        """
        prompt = len(req.origin_input_ids) if self.config.retain.prompt == "keep" else 0
        return protected(tree, prompt, self.page_size)

    def bound(self, req: Any, tree: int) -> int:
        """Most blocks that the tree does not own and the request holds while it decodes.

        Parameters
        ----------
        req
            The request; its own budget counts, not the server's.
        tree
            Positions that the radix tree owns (tokens).
        """
        prefix, rest = self.protected(req, tree)
        budget = self.override_of(req).budget + rest
        return prefix - tree + request_bound(budget, self.config.rounds.interval, self.page_size)

    def budgets_of(self, req: Any) -> tuple[int, ...] | None:
        """Per-layer k_l of a request, None if it is not evicted from."""
        override = self.override_of(req)
        if not self.evicts(req):
            return None
        if override.budget == self.config.budget.tokens:
            return self.budgets
        return scale(self.budgets, override.budget - self.config.recent, self.config.floor)

    def own_blocks(self, req: Any) -> int:
        """Blocks that a running request holds now and the radix tree does not own."""
        kv = req.kv
        return int(kv.kv_allocated_len - kv.cache_protected_len - self.ledger.dead_len(kv.req_pool_idx))

    # -- rounds -----------------------------------------------------------------------------------------------------

    def follow(self, req: Any) -> RequestState:
        """Look up a decoding request's state, opening it at its first sight."""
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
            )
        state.observe(kv.kv_allocated_len, self.page_size)
        state.count_step(kv.kv_allocated_len, self.page_size)
        return state

    def run_rounds(self, due: Sequence[tuple[RequestState, int]], allocator: Any) -> None:
        """Carry out the rounds of all due requests.

        Parameters
        ----------
        due
            (state, committed length) of each due request.
        allocator
            SGLang's slot allocator; freed blocks go back to it.
        """
        started = time.perf_counter()
        plans = [(state, self._plan(state, committed)) for state, committed in due]
        budget_cells = max(int(SCRATCH_FRACTION * self.num_layers * self.pool.cells.blocks), 1)
        while plans:
            group = [plans.pop(0)]
            moved = sum(group[0][1].kept)
            while plans and moved + sum(plans[0][1].kept) <= budget_cells:
                moved += sum(plans[0][1].kept)
                group.append(plans.pop(0))
            self._launch([plan for _, plan in group], [state for state, _ in group], allocator)
        self.counters.round_seconds += time.perf_counter() - started

    def _plan(self, state: RequestState, committed: int) -> RoundPlan:
        if self.config.budget.allocation != "breakpoint":
            return self.ledger.plan(state, committed, state.budgets)
        pending = state.pending
        if not isinstance(pending, Pending):
            return self.ledger.plan(state, committed, state.budgets)
        if pending.event is not None:
            pending.event.synchronize()  # reached long ago; polling instead would let ranks diverge
        everything = self.ledger.plan(state, committed, (committed,) * self.num_layers)
        budgets, flat = breakpoint_budgets(
            pending.counts.tolist(),
            pending.observed,
            everything.candidates,
            sum(state.budgets) // self.num_layers,
            self.config.floor,
        )
        state.thresholds = [2 * t if f else b for t, b, f in zip(state.thresholds, state.budgets, flat, strict=True)]
        return self.ledger.plan(state, committed, budgets)

    def _launch(self, plans: list[RoundPlan], states: list[RequestState], allocator: Any) -> None:
        result = run_round(
            plans,
            self.pool.cells,
            self.req_to_token,
            self.policy,
            self._reduce if self.tp_size > 1 else None,
        )
        allocator.free_segment(result.freed, start_pos=0)
        counts = self._breakpoints(result)
        counters = self.counters
        counters.launches += 1
        counters.rounds += len(plans)
        counters.blocks_freed += result.freed.numel()
        for i, (state, plan) in enumerate(zip(states, plans, strict=True)):
            counters.requests_pruned += state.rounds == 0
            for layer, (n, k) in enumerate(zip(plan.candidates, plan.kept, strict=True)):
                counters.evicted[layer] += n - k
            self.ledger.commit(state, plan)
            if counts is not None:
                state.pending = Pending(counts[0][:, i], counts[1], plan.candidates)
        if self.config.debug.fingerprints or self.config.debug.record_kept:
            self._record(states, plans, result)

    def _breakpoints(self, result: RoundResult) -> tuple[torch.Tensor, Any] | None:
        if self.config.budget.allocation != "breakpoint":
            return None
        counts = breakpoint_counts(result.rank, result.pinned, result.candidates)
        if counts.device.type == "cpu":
            return counts, None
        host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
        host.copy_(counts, non_blocking=True)
        event = torch.get_device_module(counts.device).Event()
        event.record()
        return host, event

    def measured(self) -> list[dict[str, Any]]:
        """Hand out, once, the statistics of requests that finished under ``debug.measure``, averaged over ranks.

        Every rank must call it at the same time, as SGLang does for what it reports.

        Returns
        -------
        list[dict]
            Per request: ``rid``, ``prompt_tokens``, ``queries``; ``by_length`` maps a power of two to the ``queries``
            whose context has that many to twice as many tokens, and the ``sums`` ``[L][PER_QUERY]`` over them;
            ``per_prompt`` ``[L][PER_PROMPT]``.
        """
        records = self.measurer.drain() if self.measurer is not None else []
        if records and self.tp_size > 1:
            mean = self._reduce(torch.stack([record.values for record in records]).to(self.req_to_token.device)).cpu()
            records = [record._replace(values=values) for record, values in zip(records, mean, strict=True)]
        return [record.report() for record in records]

    def _reduce(self, scores: torch.Tensor) -> torch.Tensor:
        """Average over tensor-parallel ranks, in rank order, so that every rank ranks the same numbers."""
        parts = [torch.empty_like(scores) for _ in range(self.tp_size)]
        torch.distributed.all_gather(parts, scores.contiguous(), group=self.tp_group)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total / self.tp_size

    def _record(self, states: list[RequestState], plans: list[RoundPlan], result: RoundResult) -> None:
        """Debug only: hash and log which logical positions survived (synchronises)."""
        assert result.kept_position is not None
        positions = result.kept_position.tolist()
        start = 0
        for state, plan in zip(states, plans, strict=True):
            layers = []
            for k in plan.kept:
                layers.append(positions[start : start + k])
                start += k
            self.counters.fingerprint.update(repr((state.rid, plan.new_tail, layers)).encode())
            if self.config.debug.record_kept:
                self.counters.kept_log.append(
                    {
                        "rid": state.rid,
                        "round": state.rounds,
                        "prefix": plan.prefix,
                        "rest": state.rest,
                        "tail": plan.new_tail,
                        "kept": layers,
                    }
                )

        if self.config.debug.fingerprints:
            digest = self.counters.fingerprint.digest()[:8]
            logger.info("KV eviction: kept-set fingerprint %d %s", self.counters.launches, digest.hex())
            if self.tp_size > 1:
                self._compare_ranks(digest)

    def _compare_ranks(self, digest: bytes) -> None:
        """Debug only: stop the server where tensor-parallel ranks have kept different tokens.

        Raises
        ------
        RuntimeError
            With every rank's fingerprint, on every rank.
        """
        mine = torch.tensor(list(digest), dtype=torch.uint8, device=self.req_to_token.device)
        parts = [torch.empty_like(mine) for _ in range(self.tp_size)]
        torch.distributed.all_gather(parts, mine, group=self.tp_group)
        digests = [bytes(part.tolist()).hex() for part in parts]
        if len(set(digests)) > 1:
            raise RuntimeError(
                f"KV eviction: tensor-parallel ranks kept different tokens in launch {self.counters.launches}: "
                f"fingerprints {', '.join(digests)} of ranks 0 to {self.tp_size - 1}"
            )

    # -- end of a request -------------------------------------------------------------------------------------------

    def released(self, row: int, allocated: int) -> None:
        """Note that SGLang releases a row's KV: the request finished, was aborted or retracted."""
        state = self.ledger.requests.get(row)
        if state is not None:
            state.observe(allocated, self.page_size)

    def close_rows(self, rows: Sequence[int]) -> None:
        """Forget rows that SGLang frees."""
        if self.measurer is not None:
            self.measurer.close(rows)
        if self.shadow is not None:
            self.shadow.forget(rows)
        for state in self.ledger.close(rows):
            self.counters.peak_request = max(self.counters.peak_request, state.peak)
            self.counters.last_finished = {
                "rid": state.rid,
                "rounds": state.rounds,
                "blocks_held_peak": state.peak,
                "blocks_stock_peak": state.length,
                "evicted_per_layer": list(state.evicted),
                "steps": state.steps,
                "own_held_mean": state.held_sum / max(state.steps, 1),
                "own_stock_mean": state.stock_sum / max(state.steps, 1),
            }
            if self.config.debug.record_requests:
                self.counters.finished.append(self.counters.last_finished)


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
