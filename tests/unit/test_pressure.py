"""Shares over the layers of a model: whatever a request's past, layers of a class keep alike and lists stay whole."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from cache_model import MiniPool

from lethe_sglang.attention.length_classes import LengthClasses
from lethe_sglang.cache.layout import page_ceil
from lethe_sglang.cache.shares import Claim, freed, gains, share_of
from lethe_sglang.config import from_mapping

runtime_module = pytest.importorskip("lethe_sglang.engine.runtime")

LAYERS = (10, 22, 10, 34, 22)


def giver(runtime, row, prompt, committed, **kv_evict):
    kv = SimpleNamespace(req_pool_idx=row, cache_protected_len=0, kv_allocated_len=0, kv_committed_len=committed)
    kv.kv_allocated_len, kv.holds_kv = committed, True
    asked = SimpleNamespace(custom_params={"kv_evict": kv_evict} if kv_evict else None)
    req = SimpleNamespace(kv=kv, rid=f"r{row}", sampling_params=asked, beam_group=None, origin_input_ids=[0] * prompt)
    req.finished = lambda: False
    return req, runtime.follow(req)


@pytest.mark.parametrize("page", [1, 8])
@pytest.mark.parametrize("multiple", [False, True], ids=["cells", "pages"])
def test_any_history_of_shares_keeps_the_layers_of_a_class_alike(page, multiple):
    """Plans alone, no cells: shares go up and down at random while requests of unequal prompts and floors grow."""
    rng = random.Random(page)
    config = from_mapping(
        {
            "budget": {"allocation": "list", "layers": [k + 8 for k in LAYERS]},
            "rounds": {"interval": 8, "when": "pressure"},
            "retain": {"recent_ratio": 0.28, "sinks": 2},
        }
    )
    budgets = tuple(tokens - config.recent for tokens in config.budget.layers)
    runtime = runtime_module.Runtime(config, budgets, page, None)
    pool = MiniPool(num_layers=len(LAYERS), page=page, recent=config.recent, interval=8, context=900)
    runtime.pool, runtime.ledger, runtime.req_to_token = SimpleNamespace(cells=pool.cells), pool.ledger, None
    runtime.length_classes = [LengthClasses(budgets, runtime.ledger)]
    runtime.ledger.multiple = page if multiple else 1
    runtime._start_ledger()
    assert runtime.ledger.on_demand
    rounds = 0
    for trial in range(60):
        asked = {"budget": rng.randrange(config.min_request_budget, 90)} if trial % 3 == 0 else {}
        prompt, committed = rng.randrange(0, 40), 60
        req, state = giver(runtime, 1 + trial % 3, prompt, committed, **asked)
        assert state.due_at > 10**9, "nothing is due by itself"
        floor = runtime.override_of(req).budget
        for _ in range(8):
            committed += rng.randrange(0, 50)
            req.kv.kv_committed_len = req.kv.kv_allocated_len = committed
            share = rng.randrange(0, 160)
            plan = runtime.pressure._plan((req, state), share)
            most = pool.ledger.plan(state, committed, (0,) * len(LAYERS))
            keep = page_ceil(max(share, floor - config.recent) + state.rest, page)
            if plan is None:
                assert freed(most) <= keep + page, "a request above its share gives nothing"
                continue
            assert freed(most) > keep, "a request that holds no more than its share gives"
            for classes in runtime.length_classes:
                classes.check(plan)
            claim = runtime.pressure._claim((req, state))
            assert freed(plan) <= claim.most
            runtime.ledger.commit(state, plan)
            state.layout.check(page, len(LAYERS), state.kept, committed)
            rounds += 1
        runtime.ledger.close([1 + trial % 3])
    assert rounds > 200


@pytest.mark.parametrize("page", [1, 4])
def test_the_share_is_the_largest_that_gives_enough(page):
    rng = random.Random(3)
    for _ in range(300):
        claims = [
            Claim(page * rng.randrange(0, 60), rng.randrange(1, 90), rng.randrange(0, page))
            for _ in range(rng.randrange(1, 6))
        ]
        needed = rng.randrange(0, 150)

        def given(share, claims=claims):
            kept = [-(-(max(c.floor, share) + c.rest) // page) * page for c in claims]
            return [max(c.most - k, 0) for c, k in zip(claims, kept, strict=True)]

        enough = [share for share in range(1, 300) if sum(given(share)) >= needed]
        found = share_of(claims, needed, page)
        assert gains(claims, found, page).tolist() == given(found)
        if needed and enough:
            assert found == max(enough)
        elif needed:
            assert found == 0
    assert share_of([], 5, page) == 0


def test_admission_counts_on_what_rounds_give_in_the_end_and_at_once():
    from lethe_sglang.engine.admission import LethePrefillAdder

    lent = [(30, 20), (12, 5)]
    adder = object.__new__(LethePrefillAdder)
    adder.lethe = SimpleNamespace(
        ledger=SimpleNamespace(on_demand=True), pressure=SimpleNamespace(lend=lambda running: lent.pop(0))
    )
    adder.running_batch, adder._lent = object(), (0, 0)
    adder.memory_budget = SimpleNamespace(total_offset=100, current_offset=50)
    adder._lend()
    assert (adder.memory_budget.total_offset, adder.memory_budget.current_offset) == (70, 30)
    adder._lend()  # after a preemption: somebody who would have given is gone
    assert (adder.memory_budget.total_offset, adder.memory_budget.current_offset) == (88, 45)


@pytest.mark.parametrize("finishing", [False, True])
def test_no_event_where_a_result_in_flight_brings_memory_back(finishing):
    pressure = runtime_module.Pressure(SimpleNamespace(ledger=SimpleNamespace(window=None, interval=4)))
    reqs = [SimpleNamespace(kv=SimpleNamespace(holds_kv=False)) for _ in range(3)]
    batch = SimpleNamespace(
        reqs=reqs,
        new_tokens_required_next_decode=len,
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 1),
        tree_cache=SimpleNamespace(evictable_size=lambda: 0),
    )
    scheduler = SimpleNamespace(
        _reqs_finishing_inflight=lambda batch: reqs[:1] if finishing else [], token_to_kv_pool_allocator=None
    )
    asked = []
    pressure.relieve = lambda givers, lacking, steppers, *rest: asked.append((lacking, steppers))
    pressure.before_decode(scheduler, batch, lambda: None)
    assert asked == ([] if finishing else [(2, 3)])


def test_admission_looks_again_once_somebody_new_can_give(monkeypatch):
    from lethe_sglang.engine import lifecycle

    ledger = SimpleNamespace(requests={}, on_demand=True, dirty=False)
    state = SimpleNamespace(due_at=2**31 - 1)
    runtime = SimpleNamespace(
        ledger=ledger,
        follow=lambda req: ledger.requests.setdefault(req.kv.req_pool_idx, state),
        pressure=SimpleNamespace(before_decode=lambda *args: None),
    )
    monkeypatch.setattr(lifecycle, "current", lambda: runtime)
    kv = SimpleNamespace(holds_kv=True, req_pool_idx=3, kv_committed_len=9)
    req = SimpleNamespace(kv=kv, decode_batch_idx=1, finished=lambda: False)
    scheduler = SimpleNamespace(_reqs_finishing_inflight=lambda batch: [], device="cpu")
    batch = SimpleNamespace(reqs=[req], batch_is_full=True)
    lifecycle.on_decode_step(scheduler, batch)
    assert not batch.batch_is_full
    batch.batch_is_full = True
    lifecycle.on_decode_step(scheduler, batch)
    assert batch.batch_is_full, "it looks again though nobody is new"
