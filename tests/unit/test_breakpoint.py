"""The paper's breakpoint, reading R1."""

from __future__ import annotations

import pytest
import torch
from cache_model import MiniPool

from lethe_sglang.allocation.breakpoint import breakpoint_budgets, breakpoint_counts
from lethe_sglang.cache.breakpoints import Pending, count, plan
from lethe_sglang.cache.ledger import Ledger
from lethe_sglang.cache.rounds import run_round
from lethe_sglang.config import from_mapping


def counts(values, ratio=10.0, segments=4, sinks=0):
    rank = torch.tensor(values).view(1, 1, -1)
    pinned = (torch.arange(rank.shape[-1]) < sinks).view(1, 1, -1)
    return int(breakpoint_counts(rank, pinned, torch.tensor([[len(values)]]), ratio, segments))


def test_keeps_whole_segments_down_to_the_last_that_starts_above_the_ratio():
    assert counts([100.0, 90.0, 50.0, 11.0, 9.0, 1.0, 0.5, 0.1]) == 4
    assert counts([0.1, 0.5, 1.0, 100.0, 90.0, 11.0, 9.0, 50.0]) == 4


def test_flat_scores_have_no_breakpoint():
    assert counts([1.0] * 8) == 8
    assert counts([0.0] * 8) == 8


def test_a_larger_ratio_keeps_more():
    values = [2.0**-i for i in range(32)]
    kept = [counts(values, ratio=r, segments=32) for r in (2.0, 100.0, 800.0)]
    assert kept == sorted(kept) and kept[0] < kept[-1]


def test_a_sink_does_not_set_the_scale():
    values = [1000.0, *[1.0] * 4, *[0.01] * 3]
    assert counts(values, sinks=1) == 6
    assert counts(values, sinks=0) == 2


def test_padding_is_not_counted():
    rank = torch.tensor([[[5.0, 4.0, float("-inf"), float("-inf")]]])
    got = breakpoint_counts(rank, torch.zeros_like(rank, dtype=torch.bool), torch.tensor([[2]]), 10.0, 64)
    assert int(got) == 2


def test_budgets_never_exceed_the_mean_and_flat_layers_are_told_apart():
    budgets, flat = breakpoint_budgets((4, 20, 30), (20, 20, 60), (24, 28, 40), mean=20, floor=3)
    assert flat == (False, True, False)
    assert sum(budgets) <= 60 and min(budgets) >= 3
    assert budgets[0] < budgets[1]
    assert breakpoint_budgets((4, 5, 6), (20, 20, 20), (24, 24, 24), 20, 3)[0] == (4, 5, 6)


def test_no_layer_gets_less_than_the_rest_of_a_kept_prompt_and_the_floor():
    ledger = Ledger(2, 4, page_size=16, recent=16, interval=16, device="cpu")
    state = ledger.open("r", 1, 16, (40, 40, 40, 40), committed=31, rest=15, pinned=15)
    state.pending = Pending(torch.tensor([200, 10, 200, 12]), None, (200, 200, 200, 200))
    kept = plan(ledger, state, committed=230, floor=5).kept
    assert min(kept) >= 15 + 5 and sum(kept) <= 4 * (40 + 15)


@pytest.mark.parametrize(
    ("options", "by"), [({}, "score"), ({"lethe": {"key_share": 0}}, "score"), ({"policy": "keydiff"}, "rank")]
)
def test_what_is_counted_is_attention_however_tokens_are_ranked(options, by):
    ranked = from_mapping(options).built_policy
    pool = MiniPool()
    state = pool.admit(1, 40, 4, (8, 8, 8))
    plan = pool.ledger.plan(state, 40, (8, 8, 8))
    scores = [[pool.score(1, layer, position) for position in range(4, plan.new_tail)] for layer in range(3)]
    result = run_round([plan], pool.cells, pool.req_to_token, ranked)
    expected = {"score": torch.tensor(scores), "rank": result.rank[:, 0]}[by]
    torch.testing.assert_close(result.salience[:, 0], expected)
    pending = count(result, [plan])[0]
    pinned = torch.zeros_like(result.valid)
    assert pending.counts.tolist() == breakpoint_counts(result.salience, pinned, result.valid.sum(-1))[:, 0].tolist()
