"""Packed blocks are arithmetic: these tests hold the arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lethe_sglang.cache.layout import (
    RowLayout,
    packed_blocks,
    packed_cell,
    packed_offsets,
    page_ceil,
    page_floor,
    request_bound,
)


def test_pages_round_both_ways():
    assert [page_ceil(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]
    assert [page_floor(n, 8) for n in (0, 7, 8, 9)] == [0, 0, 8, 8]


@given(st.lists(st.integers(0, 200), min_size=1, max_size=12), st.sampled_from([1, 8, 16]))
def test_every_kept_cell_has_its_own_place_in_the_packed_blocks(kept, page):
    blocks = packed_blocks(kept, page)
    assert blocks % page == 0
    places = set()
    for offset, count in zip(packed_offsets(kept), kept, strict=True):
        for q in range(count):
            layer, block = packed_cell(offset + q, len(kept))
            assert 0 <= layer < len(kept) and 0 <= block < blocks
            places.add((layer, block))
    assert len(places) == sum(kept)


def test_packed_memory_follows_the_mean_not_the_largest_layer():
    assert packed_blocks([10, 0, 0, 2], 1) == 3


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
