"""A configuration that changes under running requests: their rounds, what they may hold, and what is refused."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from cache_model import MiniPool

from lethe_sglang.attention.length_classes import LengthClasses
from lethe_sglang.cache.layout import page_ceil
from lethe_sglang.config import ConfigError, from_mapping
from lethe_sglang.config.changes import reconfigured
from lethe_sglang.kernels.table import read

runtime_module = pytest.importorskip("lethe_sglang.engine.runtime")
unfinished = pytest.importorskip("lethe_sglang.engine.reconfigure").unfinished
reach = pytest.importorskip("lethe_sglang.engine.reach")

LAYERS = 3
IDLE = (0, 0)
BASE = {"policy": "lethe", "budget": {"tokens": 30}, "rounds": {"interval": 8}, "retain": {"sinks": 2}}


class Allocator:
    """Takes freed slots back into the miniature pool."""

    def __init__(self, pool):
        self.pool = pool

    def free_segment(self, freed, start_pos):
        pages = (freed[:: self.pool.page] // self.pool.page).tolist()
        assert not set(pages) & set(self.pool.free)
        self.pool.free += pages


def served(page=1, captured=False, **sections):
    """A runtime over a miniature pool, and a way to change its budget per layer."""
    config = from_mapping({**BASE, **sections})
    runtime = runtime_module.Runtime(config, layers_of(config), page, None, captured=captured)
    pool = MiniPool(num_layers=LAYERS, page=page, recent=config.recent, interval=config.rounds.interval, context=900)
    runtime.pool, runtime.ledger, runtime.req_to_token = (
        SimpleNamespace(cells=pool.cells, scratch_bytes=0, scratch=None, size=900),
        pool.ledger,
        pool.req_to_token,
    )
    runtime._start_ledger()
    return runtime, pool


def layers_of(config):
    k = config.scored
    return (max(config.floor, k // 2), k, k + k - max(config.floor, k // 2))


def change(runtime, options, busy=IDLE):
    config = reconfigured(runtime.config, options)
    return runtime.reconfigure(config, layers_of(config), busy)


def request(row, prompt, **kv_evict):
    kv = SimpleNamespace(req_pool_idx=row, cache_protected_len=0, kv_allocated_len=0, kv_committed_len=0)
    asked = SimpleNamespace(custom_params={"kv_evict": kv_evict} if kv_evict else None)
    return SimpleNamespace(kv=kv, rid=f"r{row}", sampling_params=asked, beam_group=None, origin_input_ids=[0] * prompt)


def step(runtime, pool, req):
    """One decode step: its head, where a round may be due, and the token it writes; returns the plan of a round."""
    row, plan = req.kv.req_pool_idx, None
    req.kv.kv_committed_len = req.kv.kv_allocated_len = pool.seq[row]
    state = runtime.follow(req)
    held = page_ceil(pool.seq[row], pool.page) - state.layout.dead_len
    fits = held <= runtime.bound(req, 0, state) or pool.seq[row] >= state.due_at  # a smaller budget is due at once
    assert fits, "a request holds more than admission reckons with"
    if pool.seq[row] >= state.due_at:
        tail = state.layout.tail
        runtime.run_rounds([(state, pool.seq[row])], Allocator(pool))
        assert state.layout.tail >= tail + page_ceil(1, pool.page), "a tail went back"
        state.layout.check(pool.page, LAYERS, state.kept, pool.seq[row])
        plan = state
    pool.write(row, pool.seq[row])
    return plan


@pytest.mark.parametrize("page", [1, 8])
@pytest.mark.parametrize("seed", range(4))
def test_budgets_windows_and_intervals_change_under_running_requests(page, seed):
    rng = random.Random(seed)
    runtime, pool = served(page, requests={"max_budget": 200})
    reqs = [request(1, 12), request(2, 5, budget=40)]
    for req in reqs:
        for position in range(len(req.origin_input_ids)):
            pool.write(req.kv.req_pool_idx, position)
    for _ in range(250):
        if rng.random() < 0.04:
            options = {
                "budget": {"tokens": rng.choice([12, 20, 30, 55, 90])},
                "rounds": {"interval": rng.choice([1, 8, 30])},
            }
            change(runtime, options, busy=(2, 0))
        for req in reqs:
            state = step(runtime, pool, req)
            if state is not None:
                assert state.budgets == tuple(k + state.rest for k in runtime.budgets_of(req)), "planned by old budgets"
                assert all(k <= b for k, b in zip(state.kept, state.budgets, strict=True))
        pool.check_conservation()
        row = rng.choice((1, 2))
        for layer in range(LAYERS):
            lists = pool.lists([row])
            cells = lists.cells[layer, 0, : int(lists.length[layer, 0])]
            found = pool.cells.key[cells, 0]
            assert bool((found[:, 0] == row).all()) and bool((found[:, 1] == layer).all()), "a cell of somebody else"
            assert int(found[-1, 2]) == pool.seq[row] - 1 and len(set(found[:, 2].tolist())) == len(found)
    assert runtime.counters.rounds > 10


def test_without_a_change_the_bound_is_that_of_the_budget():
    for page in (1, 8):
        runtime, pool = served(page, retain={"sinks": 2, "prompt": "evict"})
        req = request(1, 10)
        for position in range(10):
            pool.write(1, position)
        fresh = runtime.bound(request(3, 10), 0)
        for _ in range(200):
            step(runtime, pool, req)
            assert runtime.bound(req, 0, runtime.ledger.requests[1]) == fresh == 30 + 8 + 2 * page
        assert runtime.counters.rounds > 5


def test_an_empty_change_renews_nothing():
    runtime, _ = served()
    assert change(runtime, {}) == {"changed": {}, "effective": "now"} and runtime.version == 0
    assert change(runtime, {"requests": {"allow_off": False}}, busy=(2, 0))["effective"] == "now"
    assert change(runtime, {"rounds": {"interval": 9}}, busy=(2, 0))["effective"] == "next round"
    assert change(runtime, {"rounds": {"interval": 8}})["effective"] == "now" and runtime.version == 3


def test_a_profile_that_was_measured_anew_is_taken_over_under_its_old_name():
    runtime, _ = served(budget={"tokens": 30, "allocation": "profile", "profile": "file.yaml"})
    other = tuple(reversed(runtime.budgets))
    with pytest.raises(ConfigError, match=r"^kv_evict: budget\.profile: changes on an idle server only"):
        runtime.reconfigure(runtime.config, other, (1, 0))
    assert runtime.budgets != other
    answer = runtime.reconfigure(runtime.config, other, IDLE)
    assert answer == {"changed": {"budget.profile": ["file.yaml", "file.yaml"]}, "effective": "now"}
    assert runtime.budgets == other and runtime.version == 1


def test_a_window_that_has_begun_goes_on_and_one_that_has_not_is_moved():
    runtime, pool = served(policy="snapkv", snapkv={"window": 5})
    req = request(1, 4)
    for position in range(4):
        pool.write(1, position)
    step(runtime, pool, req)
    state = runtime.ledger.requests[1]
    assert state.listens_from == state.due_at - 5
    change(runtime, {"budget": {"tokens": 50}}, busy=(1, 0))
    step(runtime, pool, req)
    assert state.listens_from == state.due_at - 5 > pool.seq[1], "it has moved with the round"
    while pool.seq[1] < state.due_at - 2:
        step(runtime, pool, req)
    begun = state.listens_from
    change(runtime, {"requests": {"max_budget": 70}}, busy=(1, 0))
    step(runtime, pool, req)
    runtime.ledger.flush()
    assert state.listens_from == int(read(runtime.ledger.table[1]).score_after) == begun, (
        "scores of the window were thrown away"
    )


def test_a_policy_reaches_the_backends():
    runtime, _ = served(pool={"states": "all"})
    backend = SimpleNamespace(accumulation=None)
    runtime.backends.append(backend)
    change(runtime, {"policy": "snapkv"})
    assert backend.accumulation == runtime.policy.accumulation and backend.accumulation.window == 32
    assert runtime.ledger.window == 32


def refusal(runtime, options, busy=IDLE) -> str:
    before = runtime.config, runtime.policy, runtime.budgets, runtime.version, runtime.ledger.recent
    with pytest.raises(ConfigError) as error:
        change(runtime, options, busy)
    assert before == (runtime.config, runtime.policy, runtime.budgets, runtime.version, runtime.ledger.recent)
    return str(error.value)


def test_what_a_server_cannot_do_is_refused_with_the_reason_and_nothing_is_half_applied():
    runtime, pool = served()
    assert "policy: changes on an idle server only, and 2 requests are running, 1 waiting" in refusal(
        runtime, {"policy": "h2o", "budget": {"tokens": 20}}, (2, 1)
    )
    assert "retain.sinks: changes on an idle" in refusal(runtime, {"retain": {"sinks": 1}}, (0, 1))
    assert "debug.shadow: settled when the server starts" in refusal(runtime, {"debug": {"shadow": True}})
    runtime.pool.cells = pool.cells._replace(memory=None)
    assert "lazy needs states that the pool's cells do not carry (memory); start the server with pool.states: all" in (
        refusal(runtime, {"policy": "lazy"})
    )
    runtime.pool.cells = pool.cells._replace(score=None)
    assert "carry (score)" in refusal(runtime, {"policy": "h2o"})
    with pytest.raises(ConfigError, match="got budgets for 2 layers, but the model has 3"):
        runtime.reconfigure(runtime.config, (5, 5), IDLE)


def test_under_pressure_a_floor_that_the_pool_cannot_hold_once_is_refused():
    runtime, _ = served(rounds={"interval": 8, "when": "pressure"})
    message = refusal(runtime, {"budget": {"tokens": 900}}, (1, 0))
    assert "budget.tokens: got 900, with which a request at its floor holds up to 910 tokens, but the pool" in message
    message = refusal(runtime, {"rounds": {"interval": 5000}})
    assert "rounds.interval: got 5000, for which the pool of 900 tokens has no room" in message
    change(runtime, {"budget": {"tokens": 890}}, (1, 0))
    runtime, _ = served(budget={"tokens": 900})  # always: a request is longer than that, or it is not
    assert "budget.tokens: got 900" in refusal(runtime, {"rounds": {"when": "pressure"}})


@pytest.mark.parametrize("page", [1, 8])
@pytest.mark.parametrize("prompt", ["keep", "evict"])
@pytest.mark.parametrize("interval", [1, 8, 60])
def test_the_first_round_comes_where_the_reach_says_so(monkeypatch, page, prompt, interval):
    monkeypatch.setattr(runtime_module, "stagger_of", lambda ids: 0)  # first rounds may come later than they might
    runtime, pool = served(page, rounds={"interval": interval}, retain={"sinks": 2, "prompt": prompt})
    found = reach.reach(runtime)
    req = request(1, 1)
    pool.write(1, 0)
    for length in range(1, found.first_round):
        assert step(runtime, pool, req) is None, f"a round at {length}, before {found}"
    state = step(runtime, pool, req)
    assert state is not None and sum(state.evicted) > 0, "the round evicts nothing"


def test_a_server_that_can_never_evict_says_so_once_with_the_numbers(caplog):
    def said(context=512, size=900, rank=0, **sections):
        caplog.clear()
        runtime, _ = served(**sections)
        runtime.context_length, runtime.pool.size, runtime.ranks.rank = context, size, rank
        reach.warn(runtime)
        return reach.reach(runtime).acts, [record.message for record in caplog.records]

    assert said() == (True, [])
    acts, lines = said(budget={"tokens": 1024})
    assert not acts and len(lines) == 1
    assert "with budget.tokens 1024 a request is first evicted from at 668 tokens, and none gets longer" in lines[0]
    assert "than 510 (context 512, pool 900 tokens); make budget.tokens smaller" in lines[0]
    assert said(budget={"tokens": 1024}, rank=1) == (False, []), "every rank says it"
    _, (line,) = said(context=4096, rounds={"interval": 5000})
    assert "with rounds.interval 5000" in line and "longer than 898" in line and "make rounds.interval smaller" in line
    assert not said(context=4096, budget={"tokens": 1100}, size=700)[0]
    pressure = {"interval": 5000, "when": "pressure"}
    assert said(context=4096, rounds=pressure) == (True, []), "there the interval makes room and delays nothing"
    assert not said(budget={"tokens": 1024}, rounds={"when": "pressure"})[0]


def test_captured_graphs_hold_how_a_policy_scores():
    runtime, _ = served(captured=True)
    assert "captured decode graphs hold how lethe scores; start the server with --disable-cuda-graph" in refusal(
        runtime, {"policy": "snapkv"}
    )
    assert refusal(runtime, {"lethe": {"half_life": 9}})
    change(runtime, {"lethe": {"key_share": 0.25}})  # how it ranks is not captured


def test_layers_that_share_a_plan_keep_one_length():
    runtime, _ = served()
    runtime.length_classes.append(LengthClasses((7, 7, 9), runtime.ledger))
    config = reconfigured(runtime.config, {"budget": {"tokens": 20}})
    runtime.reconfigure(config, (5, 5, 5), IDLE)
    with pytest.raises(ConfigError, match="share lists and plans"):
        runtime.reconfigure(config, (5, 6, 6), IDLE)
    with pytest.raises(ConfigError, match="share lists"):
        runtime.reconfigure(reconfigured(config, {"budget": {"allocation": "breakpoint"}}), (5, 5, 5), IDLE)


class Req:
    def __init__(self, done=False):
        self.done = done

    def finished(self):
        return self.done


def test_requests_that_run_and_wait_are_counted():
    inflight = {Req(), Req(done=True)}
    grammars = SimpleNamespace(grammar_queue=[Req()])
    scheduler = SimpleNamespace(
        collect_inflight_reqs=lambda: set(inflight), chunked_req=Req(), waiting_queue=[Req()], grammar_manager=grammars
    )
    assert unfinished(scheduler) == (2, 2)
    scheduler.chunked_req = next(iter(req for req in inflight if not req.done))
    assert unfinished(scheduler) == (1, 2), "a request is counted twice"


def test_a_request_that_waits_through_a_change_keeps_what_it_asked_for_or_the_nearest():
    runtime, _ = served()
    waiting = request(1, 5, budget=24)
    runtime.check(waiting)
    change(runtime, {"budget": {"tokens": 200}})
    smallest = runtime.config.min_request_budget
    assert smallest > 24 and (runtime.override_of(waiting).mode, runtime.override_of(waiting).budget) == (
        "on",
        smallest,
    )
