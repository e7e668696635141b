"""Admission that knows the bound: the kept prompt, the budget, an interval and two pages.

SGLang charges a candidate ``extend + max_new_tokens`` and a running request what it may still generate. With eviction
the first is at most ``extend + bound`` (what does not enter the radix tree is the request's own and intact first, so it
is charged ``max(bound, extend)``), and the second is what the request still lacks of its bound. A kept prompt that the
tree does not own is part of that bound. Without this correction freed memory admits nobody. Under pressure the bound is
that of the floor, and what running requests hold above theirs counts as free: rounds free it before it is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt.managers import schedule_policy
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from lethe_sglang.cache.layout import page_floor
from lethe_sglang.engine.runtime import Runtime, current


def is_private(req: Any, tree_cache: Any) -> bool:
    """Whether the prompt of a request never enters the radix tree, so that its tokens are own tokens."""
    return bool(req.skip_radix_cache_insert or getattr(tree_cache, "disable", False))


class LethePrefillAdder(PrefillAdder):  # type: ignore[misc]
    """``PrefillAdder`` with the footprint of evicted requests."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.lethe: Runtime = current()
        super().__init__(*args, **kwargs)
        self._lent = 0, 0
        self._lend()

    def _lend(self) -> None:
        """Let admission count on what running requests can give under pressure, as they are now."""
        if not self.lethe.ledger.on_demand or self.running_batch is None:
            return
        surplus, at_once = self.lethe.pressure.lend(self.running_batch)
        self.memory_budget.total_offset += self._lent[0] - surplus
        self.memory_budget.current_offset += self._lent[1] - at_once
        self._lent = surplus, at_once

    def _get_running_request_total_token_offset(self, req: Any) -> int:
        growth: int = int(super()._get_running_request_total_token_offset(req))
        if not req.kv.holds_kv or not self.lethe.evicts(req):
            return growth
        # Between its prefill and the processing of that result, a prompt that will be shared still looks private.
        state = self.lethe.ledger.requests.get(req.kv.req_pool_idx)
        if state is not None or is_private(req, self.tree_cache):
            lacking = self.lethe.bound(req, int(req.kv.cache_protected_len), state) - self.lethe.own_blocks(req)
        else:
            lacking = self.lethe.bound(req, self._shared_prompt(req))
        page: int = self.page_size
        return min(growth, max(lacking, page))

    def _shared_prompt(self, req: Any) -> int:
        """Positions that the radix tree owns of a request once it has taken the prompt in (tokens)."""
        return page_floor(len(req.origin_input_ids), self.page_size)

    def _growth_after_prefill(self, req: Any) -> int:
        """Most tokens a candidate adds to its footprint after its whole extend is charged."""
        if not is_private(req, self.tree_cache):
            return self.lethe.bound(req, self._shared_prompt(req))
        tree = int(req.kv.cache_protected_len)
        own: int = len(req.full_untruncated_fill_ids) - tree
        page: int = self.page_size
        return max(self.lethe.bound(req, tree) - own, 2 * page)

    @contextmanager
    def _clipped(self, req: Any) -> Iterator[None]:
        """Rebind SGLang's clip on max_new_tokens to the candidate's own bound for the duration of one add call."""
        if not self.lethe.evicts(req):
            yield
            return
        stock = schedule_policy.CLIP_MAX_NEW_TOKENS
        schedule_policy.CLIP_MAX_NEW_TOKENS = min(stock, self._growth_after_prefill(req))
        try:
            yield
        finally:
            schedule_policy.CLIP_MAX_NEW_TOKENS = stock

    def _make_private(self, req: Any) -> None:
        if self.lethe.config.retain.prompt == "evict" and self.lethe.evicts(req):
            req.skip_radix_cache_insert = True

    def add_one_req(self, req: Any, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
        """Stock, with the candidate's bound."""
        self._make_private(req)
        with self._clipped(req):
            return super().add_one_req(req, has_chunked_req, truncation_align_size)

    def add_chunked_req(self, req: Any) -> Any:
        """Stock, with the candidate's bound."""
        with self._clipped(req):
            return super().add_chunked_req(req)

    def add_one_req_ignore_eos(self, req: Any) -> AddReqResult:
        """Fixed-length requests without a radix tree: stock simulates their growth to full length, which never comes.

        Instead the candidate is charged like any other; stock's own switch for pools that its simulation does not
        describe turns the simulation off.
        """
        if not self.lethe.evicts(req):
            return super().add_one_req_ignore_eos(req)
        extend = len(req.full_untruncated_fill_ids) - req.prefix_len
        remaining = max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
        growth = min(remaining, self._growth_after_prefill(req))
        if extend + growth + self.per_req_token_overhead >= self.rem_total_tokens:
            return AddReqResult.NO_TOKEN
        hybrid = getattr(self, "is_hybrid_swa")  # noqa: B009 - set by the untyped base class
        self.is_hybrid_swa = True
        try:
            return super().add_one_req_ignore_eos(req)
        finally:
            self.is_hybrid_swa = hybrid

    def preempt_to_schedule(self, req: Any) -> bool:
        """Stock, with the candidate's bound."""
        with self._clipped(req):
            preempted = bool(super().preempt_to_schedule(req))
        self._lend()
        return preempted
