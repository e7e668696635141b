"""Packed blocks are arithmetic: these tests hold the arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lethe_sglang.allocation.budgets import scale
from lethe_sglang.cache.layout import (
    RowLayout,
    narrow_layers,
    packed_blocks,
    packed_cell,
    page_ceil,
    page_floor,
    request_bound,
)


def test_pages_round_both_ways():
    assert [page_ceil(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]
    assert [page_floor(n, 8) for n in (0, 7, 8, 9)] == [0, 0, 8, 8]


@given(st.lists(st.integers(0, 200), min_size=1, max_size=12), st.sampled_from([1, 8, 16]), st.booleans())
def test_every_kept_cell_has_its_own_place_in_the_packed_blocks(kept, page, some_narrow):
    narrow = narrow_layers(kept) if some_narrow else (False,) * len(kept)
    blocks = packed_blocks(kept, page, narrow)
    assert blocks % page == 0
    places = set()
    for layer, count in enumerate(kept):
        for q in range(count):
            owner, block = packed_cell(kept, blocks, layer, q)
            assert 0 <= owner < len(kept) and 0 <= block < blocks
            assert (owner, block) == (layer, q) or q >= blocks, "a cell for which there is room at home lies elsewhere"
            places.add((owner, block))
    assert len(places) == sum(kept)


BUDGET = st.lists(st.integers(3, 90), min_size=1, max_size=12)


@given(BUDGET, st.integers(3, 120), st.integers(0, 300), st.sampled_from([1, 8, 16]))
def test_a_narrow_layer_has_no_excess_and_costs_no_block_beyond_its_budget(budgets, mean, candidates, page):
    """Whatever a request asks for, and however many candidates there are when its first round comes."""
    narrow, asked = narrow_layers(budgets), scale(budgets, mean, 3)
    kept = [min(budget, candidates) for budget in asked]
    blocks = packed_blocks(kept, page, narrow)
    assert all(k <= blocks for k, own in zip(kept, narrow, strict=True) if own)
    assert blocks <= page_ceil(max(mean, *(k for k, own in zip(asked, narrow, strict=True) if own)), page)


def test_packed_memory_follows_the_mean_not_the_largest_layer():
    assert packed_blocks([10, 0, 0, 2], 1, (False,) * 4) == 3
    assert packed_blocks([10, 4, 0, 2], 1, (False, True, True, True)) == 4
    assert narrow_layers((10, 4, 0, 2)) == (False, True, True, True) and all(narrow_layers((7, 7, 7)))
    assert narrow_layers((101, 101, 101, 50, 151)) == (True, True, True, True, False), "rounding tells nobody apart"


def test_excess_lies_in_holes_layer_by_layer():
    kept = (5, 1, 4, 2)  # m = 3: layer 0 has two cells too many, layer 2 one; layer 1 has two holes, layer 3 one
    assert [packed_cell(kept, 3, 0, q) for q in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]
    assert [packed_cell(kept, 3, 2, q) for q in range(4)] == [(2, 0), (2, 1), (2, 2), (3, 2)]


def test_live_ranges_exclude_the_dead_positions():
    layout = RowLayout(prefix=16, packed=8, tail=40)
    assert layout.dead == (24, 40)
    assert layout.live([(16, 50)]) == [(16, 24), (40, 50)]
    assert layout.live([(16, 30), (32, 50)]) == [(16, 24), (40, 50)]
    assert layout.live([(26, 38)]) == []
    assert layout.live([(0, 20), (45, 50)]) == [(0, 20), (45, 50)]


def test_an_intact_row_has_no_dead_positions():
    assert RowLayout(prefix=16, packed=0, tail=16).live([(16, 50)]) == [(16, 50)]


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6), st.lists(st.integers(0, 20), min_size=2, max_size=6))
def test_live_ranges_are_the_set_difference(prefix, packed, dead, cuts):
    layout = RowLayout(prefix=prefix, packed=packed, tail=prefix + packed + dead)
    cuts = sorted(cuts)
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    lo, hi = layout.dead
    expected = {p for a, b in ranges for p in range(a, b)} - set(range(lo, hi))
    got = [p for a, b in layout.live(ranges) for p in range(a, b)]
    assert len(got) == len(set(got)) and set(got) == expected


def test_check_names_the_numbers():
    RowLayout(8, 8, 24).check(8, 2, (7, 9), 30)
    with pytest.raises(AssertionError, match="do not fit"):
        RowLayout(8, 8, 24).check(8, 2, (9, 9), 30)
    with pytest.raises(AssertionError, match="page multiples"):
        RowLayout(8, 4, 24).check(8, 2, (1, 1), 30)


def test_the_bound_of_a_request():
    assert request_bound(192, 30, 8) == 192 + 32 + 16
