"""A round keeps the right cells, moves them intact, and gives back exactly the blocks it says."""

from __future__ import annotations

from array import array
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from cache_model import MiniPool

from lethe_sglang.cache.layout import narrow_layers, request_bound
from lethe_sglang.cache.ledger import NEVER
from lethe_sglang.cache.rounds import TEMPORARY_BYTES, groups
from lethe_sglang.config import from_mapping
from lethe_sglang.engine.runtime import Runtime
from lethe_sglang.policies.lethe import LethePolicy
from lethe_sglang.policies.random import RandomPolicy
from lethe_sglang.policies.streaming import StreamingPolicy

BY_SCORE = LethePolicy(key_share=0)


def own_positions(pool, row):
    """Per layer, the logical positions that decode would gather, read from the cells themselves."""
    lists = pool.lists([row])
    out = []
    for layer in range(pool.num_layers):
        cells = lists.cells[layer, 0, : int(lists.length[layer, 0])]
        k, v = pool.cells.key[cells, 0], pool.cells.value[cells, 0]
        assert bool((k[:, 0] == row).all()) and bool((k[:, 1] == layer).all()), "a cell of somebody else"
        assert torch.equal(k[:, :3], v[:, :3]) and bool((v[:, 3] == 1).all()), "key and value part ways"
        out.append([int(p) for p in k[:, 2]])
    return out


def dense_reference(pool, row, budgets, recent_from, sinks):
    """Kept set of one round, computed directly: sinks, the best by score, everything from ``recent_from``."""
    kept = []
    for layer, candidates in enumerate(pool.truth[row]):
        old = sorted(p for p in candidates if p < recent_from)
        best = sorted(old, key=lambda p: (p < sinks, pool.score(row, layer, p), p), reverse=True)[: budgets[layer]]
        kept.append({*best, *(p for p in candidates if p >= recent_from)})
    return kept


def summed(pool, plan):
    """The score of what a layer holds of a request outside its recent window, float32 ``[L]``."""
    held = enumerate(pool.truth[plan.row])
    return torch.tensor([sum(pool.score(plan.row, layer, p) for p in t if p < plan.new_tail) for layer, t in held])


@pytest.mark.parametrize("page", [1, 8, 16])
@pytest.mark.parametrize("prefix", [0, 16])
@pytest.mark.parametrize("budgets", [(12, 12, 12), (5, 20, 11), (30, 3, 3), (2, 23, 24)])
def test_many_rounds_keep_what_a_dense_reference_keeps(page, prefix, budgets):
    pool = MiniPool(page=page)
    states = {row: pool.admit(row, 37 + row, prefix, budgets) for row in (1, 2, 3)}
    rounds = 0
    for _ in range(84):
        due = [s for s in states.values() if pool.seq[s.row] >= s.due_at]
        if due:
            before = {s.row: s.layout.tail for s in due}
            plans = pool.round(due, BY_SCORE, sinks=2)
            rounds += len(plans)
            for plan, mass in zip(plans, pool.mass.unbind(1), strict=True):
                assert plan.new_tail - before[plan.row] >= pool.ledger.interval
                gathered = summed(pool, plan)
                pool.truth[plan.row] = dense_reference(pool, plan.row, budgets, plan.new_tail, sinks=2)
                torch.testing.assert_close(mass, torch.stack((gathered, summed(pool, plan)), 1))
        for row, state in states.items():
            found = own_positions(pool, row)
            assert [set(p) for p in found] == [t | set(range(prefix)) for t in pool.truth[row]]
            for positions in found:
                assert len(positions) == len(set(positions)), "a cell is read twice"
            pool.append(row)
            assert pool.seq[row] < state.due_at + 1 or not due
        pool.check_conservation()
    assert rounds >= (3 * 6 if page == 1 else 3 * 2)


def test_a_request_never_holds_more_than_its_bound():
    for page in (1, 8):
        pool = MiniPool(page=page, num_layers=3, recent=6, interval=8)
        budgets = (4, 20, 12)
        state = pool.admit(1, 3, 0, budgets)
        for _ in range(200):
            if pool.seq[1] >= state.due_at:
                pool.round([state], BY_SCORE)
            held = -(-pool.seq[1] // page) * page - state.layout.dead_len
            assert held <= request_bound(12 + 6, 8, page)
            pool.append(1)


@pytest.mark.parametrize(("page", "tree", "prompt"), [(1, 0, 11), (4, 0, 11), (8, 0, 29), (8, 8, 29), (8, 16, 11)])
def test_a_kept_prompt_that_the_tree_does_not_own_is_part_of_the_bound(page, tree, prompt):
    config = from_mapping({"budget": {"tokens": 18}, "rounds": {"interval": 8}, "retain": {"sinks": 2}})
    runtime = Runtime(config, (12, 12, 12), page_size=page, context_length=None)
    params = SimpleNamespace(custom_params=None)
    request = SimpleNamespace(origin_input_ids=[0] * prompt, sampling_params=params, beam_group=None)
    pool = MiniPool(page=page, num_layers=3, recent=6, interval=8)
    state = pool.admit(1, prompt, tree, (4, 20, 12), prompt=prompt)
    assert runtime.protected(request, tree) == (state.layout.prefix, state.rest)
    most = 0
    for _ in range(200):
        if pool.seq[1] >= state.due_at:
            pool.round([state], BY_SCORE)
        held = -(-pool.seq[1] // page) * page - tree - state.layout.dead_len
        assert held <= runtime.bound(request, tree)
        most = max(most, held)
        pool.append(1)
    assert most >= runtime.bound(request, tree) - 2 * page - 3, "the bound is not tight, so admission wastes memory"


def test_a_bound_has_room_for_a_narrow_layer_that_rounding_puts_above_the_mean():
    config = from_mapping({"budget": {"tokens": 107}, "rounds": {"interval": 8}, "retain": {"recent_ratio": 0.05}})
    runtime = Runtime(config, (101, 100, 100, 100, 100), page_size=1, context_length=None)
    params = SimpleNamespace(custom_params={"kv_evict": {"budget": 406}})
    request = SimpleNamespace(origin_input_ids=[0] * 9, sampling_params=params, beam_group=None)
    pool = MiniPool(num_layers=5, pages=2500, context=2500, interval=8, narrow=runtime._narrow())
    asked = runtime.budgets_of(request)
    assert asked[0] == 403 and config.recent == 6
    state = pool.admit(1, 9, 0, asked, prompt=9)
    most = 0
    for _ in range(1500):
        if pool.seq[1] >= state.due_at:
            pool.round([state], StreamingPolicy())
        most = max(most, pool.seq[1] - state.layout.dead_len)
        pool.append(1)
    bound = runtime.bound(request, 0)
    assert bound == 9 + 6 + 403 + 8 + 2, "prompt, recent window, the layer's budget, interval, two pages"
    assert bound - 3 <= most <= bound


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize(("budget", "interval"), [(20, 8), (6, 16)])
def test_first_rounds_are_staggered_over_the_interval_and_the_bound_holds(page, budget, interval):
    """Requests that start together have rounds at different steps, and no more than one an interval each."""
    dues = []
    for stagger in range(3 * interval):
        pool = MiniPool(page=page, num_layers=3, recent=6, interval=interval)
        state = pool.admit(1, 3, 0, (budget,) * 3)
        state.stagger = stagger
        pool.ledger.renew(state, (budget,) * 3, 3)
        due = []
        for _ in range(120):
            if pool.seq[1] >= state.due_at:
                due.append(pool.seq[1])
                pool.round([state], BY_SCORE)
            held = -(-pool.seq[1] // page) * page - state.layout.dead_len
            assert held <= request_bound(budget + 6, interval, page)
            pool.append(1)
        assert {later - sooner for sooner, later in pairwise(due)} == {interval}
        dues.append(due[0])
    period = min(interval, budget + 1)  # no room to wait longer with a small budget
    assert dues[:period] == dues[period : 2 * period] == sorted(dues[:period])
    assert period / page <= len(set(dues)) <= period / page + 2


def test_when_a_first_round_comes_follows_from_the_prompt_alone():
    config = from_mapping({"budget": {"tokens": 18}, "rounds": {"interval": 64}, "retain": {"sinks": 2}})
    runtime = Runtime(config, (12, 12, 12), page_size=1, context_length=None)
    rows = torch.zeros(9, 90, dtype=torch.int32)
    runtime.attach(SimpleNamespace(cells=None, device="cpu"), rows)

    def due(prompt, row):
        kv = SimpleNamespace(req_pool_idx=row, kv_committed_len=len(prompt), cache_protected_len=0, kv_allocated_len=40)
        params = SimpleNamespace(custom_params=None)
        request = SimpleNamespace(
            rid=f"r{row}", kv=kv, origin_input_ids=prompt, sampling_params=params, beam_group=None
        )
        return runtime.follow(request).due_at

    first = [due([n] * 9, row) for row, n in enumerate((5, 6, 7, 8), 1)]
    again = [due(array("q", [n] * 9), row) for row, n in enumerate((8, 7, 6, 5), 5)]  # SGLang has arrays
    assert first == again[::-1] and len(set(first)) > 1


def test_nothing_is_due_while_all_layers_are_within_budget():
    pool = MiniPool()
    state = pool.admit(1, 20, 0, (50, 50, 50))
    for _ in range(30):
        assert pool.seq[1] < state.due_at
        pool.append(1)
    assert pool.ledger.open("off", 2, 0, None).due_at == NEVER


def test_packing_without_evicting_changes_nothing_that_decode_reads():
    pool = MiniPool(page=8)
    state = pool.admit(1, 60, 8, (500, 500, 500))
    before = own_positions(pool, 1)
    free = len(pool.free)
    pool.round([state], BY_SCORE)
    assert own_positions(pool, 1) == before
    assert len(pool.free) == free
    assert state.layout.packed > 0


def test_sinks_survive_whatever_their_score_and_states_travel_with_their_cell():
    pool = MiniPool()
    state = pool.admit(1, 60, 0, (4, 4, 4))
    pool.cells.score.fill_(1.0)
    pool.cells.score.view(3, -1)[:, pool.req_to_token[1, :3].long()] = -5.0
    pool.round([state], BY_SCORE, sinks=3)
    lists = pool.lists([1])
    for layer in range(3):
        cells = lists.cells[layer, 0, :4]
        assert pool.cells.key[cells, 0, 2].tolist()[:3] == [0, 1, 2]
        assert pool.cells.score[cells].tolist() == [-5.0, -5.0, -5.0, 1.0]
        assert pool.cells.position[cells].tolist() == pool.cells.key[cells, 0, 2].to(torch.int32).tolist()


@pytest.mark.parametrize("prefix", [0, 1, 16])
def test_own_sinks_are_the_first_positions_behind_the_prefix_in_every_round(prefix):
    pool = MiniPool()
    state = pool.admit(1, 60, prefix, (9, 9, 9))
    for _ in range(3):
        pool.cells.score.fill_(1.0)
        pool.cells.score.view(3, -1)[:, pool.req_to_token[1, prefix : prefix + 4].long()] = -5.0
        pool.round([state], BY_SCORE, sinks=2, own_sinks=4)
        for positions in own_positions(pool, 1):
            assert positions[: prefix + 4] == list(range(prefix + 4))
        for _ in range(12):
            pool.append(1)


def test_ties_go_to_the_later_token():
    pool = MiniPool()
    state = pool.admit(1, 40, 0, (5, 5, 5))
    pool.cells.score.fill_(0.5)
    pool.round([state], BY_SCORE, sinks=0)
    assert own_positions(pool, 1)[0] == list(range(29, 40))


@pytest.mark.parametrize("extreme", [float("inf"), float("-inf"), float("nan")])
def test_a_rank_that_is_no_number_costs_neither_sinks_nor_candidates(extreme):
    pool = MiniPool()
    states = [pool.admit(row, length, 0, (5, 5, 5)) for row, length in ((1, 40), (2, 17))]
    pool.cells.score.fill_(extreme)
    pool.round(states, BY_SCORE, sinks=2)
    for row, length in ((1, 40), (2, 17)):
        for positions in own_positions(pool, row):
            assert positions[:2] == [0, 1] and len(positions) == 5 + 6 and positions[-1] == length - 1


@pytest.mark.parametrize(("page", "tree", "prompt"), [(1, 0, 11), (1, 5, 11), (4, 0, 11), (4, 8, 11), (8, 16, 11)])
def test_no_position_of_a_kept_prompt_is_ever_a_candidate_whoever_owns_its_blocks(page, tree, prompt):
    pool = MiniPool(page=page)
    state = pool.admit(1, 40, tree, (2, 3, 4), prompt=prompt)
    protected = max(tree, prompt)
    assert state.layout.prefix == max(tree, prompt // page * page) and state.layout.prefix % page == 0
    for _ in range(4):
        while pool.seq[1] < state.due_at:
            pool.append(1)
        pool.cells.score.copy_(pool.cells.key[:, 0, 2])  # the later, the better: the prompt ranks last
        (plan,) = pool.round([state], BY_SCORE, sinks=2)
        for positions, budget in zip(own_positions(pool, 1), (2, 3, 4), strict=True):
            assert positions[:protected] == list(range(protected)), "the prompt lost a token"
            assert len([p for p in positions if protected <= p < plan.new_tail]) == budget, "it is not in the budget"
            assert plan.new_tail - min(positions[protected:]) == budget, "the best are not kept"


def test_streaming_keeps_sinks_and_the_latest():
    pool = MiniPool()
    state = pool.admit(1, 40, 0, (5, 5, 5))
    pool.round([state], StreamingPolicy(), sinks=2)
    assert own_positions(pool, 1)[1] == [0, 1, *range(31, 40)]


@pytest.mark.parametrize("policy", ["streaming", "lazy"])
def test_neither_times_nor_the_lack_of_a_score_is_summed(policy):
    pool = MiniPool()
    pool.round([pool.admit(1, 60, 0, (9, 9, 9))], from_mapping({"policy": policy}).built_policy)
    assert pool.mass is None


def test_random_is_the_same_sample_however_many_rounds_there_were():
    kept = []
    for stops in ((30, 50), (50,)):
        pool = MiniPool(seed=len(stops))
        state = pool.admit(1, 20, 0, (8, 8, 8))
        while pool.seq[1] < 50:
            pool.append(1)
            if pool.seq[1] in stops:
                pool.round([state], RandomPolicy(), sinks=2)
        kept.append([sorted(positions) for positions in own_positions(pool, 1)])
    assert kept[0] == kept[1]
    assert kept[0][0] != kept[0][1], "layers draw different samples"


def test_two_due_requests_cost_one_launch_and_keep_what_each_would_alone():
    together, alone = MiniPool(seed=1), MiniPool(seed=2)
    for pool in (together, alone):
        for row in (1, 2):
            pool.admit(row, 50 + 7 * row, 0, (9, 4, 6))
    together.round(list(together.ledger.requests.values()), BY_SCORE)
    for state in list(alone.ledger.requests.values()):
        alone.round([state], BY_SCORE)
    assert [own_positions(together, r) for r in (1, 2)] == [own_positions(alone, r) for r in (1, 2)]


def test_a_launch_takes_no_more_memory_than_it_may_but_for_one_request():
    pool = MiniPool()
    for row, length in ((1, 50), (2, 57), (3, 200), (4, 45)):
        pool.admit(row, length, 0, (9, 4, 6))
    plans = [pool.ledger.plan(s, pool.seq[s.row], s.budgets) for s in pool.ledger.requests.values()]
    a_cell = pool.cells.bytes // (3 * pool.cells.blocks)
    assert a_cell == 2 * 4 * 4 + 3 * 4

    def taken(*launch):
        most = max(max(plan.candidates) for plan in launch)
        return sum(sum(plan.kept) for plan in launch) * a_cell + 3 * len(launch) * most * TEMPORARY_BYTES

    assert groups(plans, pool.cells, taken(*plans)) == [4]
    assert groups(plans, pool.cells, taken(*plans) - 1) == [3, 1], "candidates are padded to the longest of a launch"
    assert groups(plans, pool.cells, taken(*plans[:2])) == [2, 1, 1]
    assert groups(plans, pool.cells, 0) == [1, 1, 1, 1]


@pytest.mark.parametrize("page", [1, 8])
def test_a_layer_that_comes_to_be_narrow_may_have_excess_for_which_there_is_no_room(page):
    """A live server takes another budget: layers a little above the mean are at or below it, and stay packed so."""
    before, after = (103, 103, 103, 50, 151), (100, 100, 100, 50, 150)
    assert narrow_layers(before) != narrow_layers(after)
    pool = MiniPool(num_layers=5, page=page, pages=600, context=600, interval=16, narrow=narrow_layers(before))
    state = pool.admit(1, 30, 0, before)
    for _ in range(3):
        while pool.seq[1] < state.due_at:
            pool.append(1)
        (plan,) = pool.round([state], BY_SCORE)
    assert page > 1 or max(plan.kept) > plan.new_packed, "no layer has excess: the test says nothing"
    pool.ledger.configure(6, 16, False, None, narrow_layers(after))
    pool.ledger.renew(state, after, pool.seq[1])
    for _ in range(20):
        while pool.seq[1] < state.due_at:
            pool.append(1)
        (plan,) = pool.round([state], BY_SCORE)
        assert plan.new_packed <= plan.old_packed + plan.new_tail - plan.old_tail
        own_positions(pool, 1)
        pool.check_conservation()


def test_budgets_may_change_between_rounds_and_blocks_shrink_with_them():
    pool = MiniPool(page=1)
    state = pool.admit(1, 80, 0, (30, 30, 30))
    pool.round([state], BY_SCORE)
    held = state.layout.packed
    for _ in range(10):
        pool.append(1)
    pool.round([state], BY_SCORE, budgets={1: (10, 4, 7)})
    assert state.kept == (10, 4, 7) and state.layout.packed == 7 < held
    pool.check_conservation()
    own_positions(pool, 1)


def test_a_closed_row_reads_as_intact_again():
    pool = MiniPool()
    state = pool.admit(1, 60, 0, (6, 6, 6))
    pool.round([state], BY_SCORE)
    assert int(pool.ledger.table[1].abs().sum()) > 0
    assert pool.ledger.close([1, 5]) == [state]
    pool.ledger.flush()
    assert int(pool.ledger.table[1].abs().sum()) == 0
    assert pool.ledger.dead_len(1) == 0 and pool.ledger.live(1, [(0, 9)]) == [(0, 9)]
