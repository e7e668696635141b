"""The share of a full pool, against brute force: every share is tried, largest first."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lethe_sglang.cache.layout import RoundPlan
from lethe_sglang.cache.shares import Claim, freed, gains, share_of

CLAIMS = st.lists(st.builds(Claim, st.integers(0, 60), st.integers(1, 30), st.integers(0, 7)), max_size=6)
PAGES = st.sampled_from((1, 4, 8))


def given_at(claim, share, page):
    """Blocks that one request gives: what it holds beyond whole pages of its share, or of its floor."""
    keep, blocks = max(share, claim.floor) + claim.rest, 0
    while blocks < keep:
        blocks += page
    return max(claim.most - blocks, 0)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(CLAIMS, st.integers(0, 70), PAGES)
def test_what_each_gives(claims, share, page):
    assert gains(claims, share, page).tolist() == [given_at(claim, share, page) for claim in claims]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(CLAIMS, st.integers(0, 250), PAGES)
def test_the_share_is_the_largest_that_gives_what_is_needed(claims, needed, page):
    highest = max((claim.most for claim in claims), default=0)
    enough = [s for s in range(highest + 1) if sum(given_at(claim, s, page) for claim in claims) >= needed]
    assert share_of(claims, needed, page) == max(enough, default=0)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(CLAIMS, st.integers(1, 250), PAGES)
def test_whoever_holds_most_gives_and_nobody_goes_below_share_or_floor(claims, needed, page):
    share = share_of(claims, needed, page)
    given_up = gains(claims, share, page)
    left = [claim.most - given - claim.rest for claim, given in zip(claims, given_up, strict=True)]
    assert all(k >= max(claim.floor, share) for k, claim, g in zip(left, claims, given_up, strict=True) if g)
    least = min((k for k, g in zip(left, given_up, strict=True) if g), default=0)
    alike = [k for k, claim in zip(left, claims, strict=True) if claim.floor <= least]
    assert all(k <= least + 2 * page for k in alike), "one gave while another of a lower floor kept more"


@pytest.mark.parametrize("needed", [0, 1, 100])
def test_where_nobody_runs_nobody_gives(needed):
    assert share_of([], needed, 8) == 0 and gains([], 3, 8).shape == (0,)


def test_with_nothing_needed_the_share_is_all_that_anybody_holds():
    claims = [Claim(most=40, floor=8, rest=0), Claim(most=25, floor=8, rest=0)]
    assert share_of(claims, 0, 1) == 40 and not gains(claims, 40, 1).any()


def test_floors_that_together_exceed_the_pool_give_all_that_they_can():
    claims = [Claim(most=40, floor=30, rest=0), Claim(most=35, floor=33, rest=1)]
    assert share_of(claims, 1000, 1) == 0
    assert gains(claims, 0, 1).tolist() == [10, 1]


def test_gains_are_whole_numbers_even_of_large_pools():
    assert gains([Claim(2**40, 5, 0)], 0, 1).dtype == np.int64


def test_a_plan_frees_what_it_held_and_what_leaves_the_window_less_what_it_packs():
    plan = RoundPlan(
        committed=100,
        row=1,
        prefix=16,
        old_packed=24,
        old_tail=48,
        new_packed=32,
        new_tail=88,
        old_kept=(20, 28),
        candidates=(60, 68),
        kept=(30, 34),
        pinned=2,
    )
    held = plan.old_packed + plan.committed - plan.old_tail
    assert freed(plan) == held - (plan.new_packed + plan.committed - plan.new_tail) == 32
